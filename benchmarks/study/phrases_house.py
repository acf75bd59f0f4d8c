"""Topics about house and garden: cooking, gardening, repairs, animals."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Choice, Domain, HowTo, Why, topics

COOKING = Domain(
    "cooking",
    topics(
        HowTo,
        """
cook rice | cooking rice | a heavy pot with a lid | about twenty minutes
rinse the grains until the water runs clear | turn the heat low and leave the lid on
loose starch makes rice sticky | lifting the lid too often | the grains are soft but whole

bake bread | baking bread | strong flour and a hot oven | about half a day
knead the dough for ten minutes | let it rise until it has doubled
slow rising gives bread its taste | adding too much flour | the loaf sounds hollow when you tap it

make vegetable soup | making vegetable soup | a big pan and some fresh vegetables | less than an hour
fry the onions gently in butter | add the roots before the leaves
hard vegetables need more time than soft ones | boiling it too hard | a fork goes through the carrots

fry an egg | frying an egg | a flat pan and a little butter | three minutes
warm the pan before the egg goes in | cover the pan for the last minute
steam cooks the top while the pan cooks the bottom | using too much heat | the white is firm and the yolk still moves

make tomato sauce | making tomato sauce | ripe tomatoes and good olive oil | forty minutes
cook the garlic slowly in the oil | add the tomatoes and let them simmer
gentle heat makes tomatoes sweeter | adding sugar at the start | the oil rises to the top
""",
    )
    + topics(
        Why,
        """
Why do onions make us cry? | why onions make us cry | onions and tears
a cut onion sets free a gas that stings the eyes | a sharp knife breaks fewer cells
cut one onion cold and one warm | a candle takes all the sting away

Why does dough rise? | why dough rises | the rising of dough
yeast eats sugar and gives off gas | warm dough rises faster than cold dough
leave one bowl of dough in the fridge and one on the table | dough rises because of the salt

Why does toast turn brown? | why toast turns brown | the colour of toast
heat joins the sugars and proteins in bread | the same change gives coffee and roast meat their smell
toast two slices for different times | brown toast is only dry bread

Why do we add salt to food? | why we add salt to food | salt in food
salt hides bitter tastes and brings out sweet ones | a pinch of salt helps even in a cake
taste a slice of melon with salt and one without | salted water boils much faster
""",
    )
    + topics(
        Choice,
        """
butter | olive oil | the taste that you want
butter gives a rich taste | oil stands more heat | you bake a cake | you fry at high heat

fresh vegetables | frozen vegetables | how soon you will eat them
fresh ones have a better bite | frozen ones keep for months | you cook the same day | you shop once a week
""",
    ),
    (
        "the kitchen[ at {place}] tests old recipes with its students",
        "{place} sells a recipe book written by its own cooks",
        "a cook from {place} told me about this on a wet Sunday",
        "there is always something to taste at the yearly food fair of {place}",
    ),
)


GARDENING = Domain(
    "gardening",
    topics(
        HowTo,
        """
grow tomatoes | growing tomatoes | a sunny wall and some large pots | about four months
sow the seeds indoors in early spring | move the plants outside after the last frost
tomatoes need warmth at night | watering the leaves | the first yellow flowers open in June

make compost | making compost | a wooden box in a shady corner | half a year
mix green waste with dry leaves | turn the heap every few weeks
air keeps the heap warm and free of smells | adding cooked food | it is dark and smells of the forest

prune an apple tree | pruning an apple tree | a sharp saw and a steady ladder | one cold morning
cut out all the dead wood | open the middle of the tree to the light
light and air keep the fruit healthy | cutting in wet weather | a bird could fly through the crown

plant a hedge | planting a hedge | young plants with bare roots | two days in autumn
dig a long trench as deep as the roots | press the soil down and water it well
roots grow best in cool wet soil | planting too close to the fence | new buds open in spring

grow herbs on a balcony | growing herbs on a balcony | deep pots with holes in the bottom | six weeks
fill the pots with sandy soil | pick the tips of the plants every week
picking makes herbs grow thicker | keeping the soil wet all day | the plants smell strong when you touch them
""",
    )
    + topics(
        Why,
        """
Why do leaves fall in autumn? | why leaves fall in autumn | falling leaves
trees save water by dropping their leaves | a tree takes back the green before a leaf falls
put a small branch in a warm room in October | the wind alone pulls the leaves down

Why do bees visit flowers? | why bees visit flowers | bees and flowers
bees collect sweet juice and carry pollen along | one bee may visit a thousand flowers in a day
sit beside a flower bed for ten minutes and count the bees | bees eat the petals

Why do roots grow down? | why roots grow down | the way roots grow
small grains in the tips of roots feel where down is | a root will turn again if you turn the pot
grow a bean on its side in wet paper | roots only follow the light

Why are worms good for soil? | why worms are good for soil | worms in the soil
their tunnels let air and water in | worms pull dead leaves under the ground
keep a few worms in a glass of soil for a week | worms eat living roots
""",
    )
    + topics(
        Choice,
        """
a lawn | a wild meadow | how you use the garden
a lawn is good for games | a meadow feeds bees and birds | your children play outside | you want less work

clay pots | plastic pots | how often you can water
clay pots let the roots breathe | plastic pots keep water longer | you tend to water too much | you are often away
""",
    ),
    (
        "the gardens[ of {place}] are open to visitors on Sundays",
        "you can get seeds and young plants from {place} every April",
        "a gardener trained at {place} looks after our park and loves such questions",
        "they have looked into this for years at the field station of {place}",
    ),
)


REPAIRS = Domain(
    "repairs",
    topics(
        HowTo,
        """
fix a dripping tap | fixing a dripping tap | a wrench and a new rubber ring | half an hour
turn off the water under the sink | unscrew the handle and change the ring
a worn ring lets water through | using too much force | the sink stays dry all night

paint a room | painting a room | a wide roller and plenty of old sheets | a weekend
wash the walls and fill the holes | paint the edges before the middle
paint does not stick to dust | leaving the windows shut | you cannot see where one stroke ends

hang a picture | hanging a picture | a hammer and a strong nail | ten minutes
mark the place with a pencil | put the nail in at a slight angle
a slanted nail holds more weight | guessing the height | the frame stays level when you shut the door

stop a draught under a door | stopping a draught under a door | a brush strip and a few screws | one hour
measure the gap with a ruler | screw the strip to the bottom of the door
a small gap lets out a lot of heat | blocking the vents of the room | a candle beside the door burns still

clear a blocked drain | clearing a blocked drain | a rubber plunger and a bucket | less than an hour
bail out most of the water | push the plunger up and down with force
hair and fat are behind most blocked drains | pouring in strong chemicals | the water runs away in a fast spiral
""",
    )
    + topics(
        Why,
        """
Why do walls get damp? | why walls get damp | damp walls
warm air drops its water on cold surfaces | opening the windows twice a day helps a lot
tape a piece of foil to the wall and look under it a day later | damp always comes from a leaking pipe

Why do doors stick in summer? | why doors stick in summer | doors that stick
wood swells when the air is wet | a rub of soap on the edge often helps
measure a door in June and again in January | a sticking door was always badly made

Why does iron rust? | why iron rusts | rust
iron joins with water and air | salt makes rust grow faster
put one nail in dry rice and one in salt water | paint turns rust back into iron

Why does a house creak at night? | why a house creaks at night | the noises of a house
wood and metal shrink as they cool | new houses creak more than old ones
note the time of each noise for a week | creaking means that a house will soon fall down
""",
    )
    + topics(
        Choice,
        """
nails | screws | the load that it must carry
nails are fast and cheap | screws can be taken out again | the work is rough | you may move it later

new windows | thick curtains | what you can spend
new windows keep out noise and cold | curtains cost very little | you will stay for years | you rent the flat
""",
    ),
    (
        "the workshop[ at {place}] lends out tools and shows people how to use them",
        "{place} holds a repair evening on the first Monday of the month",
        "the builder who mended our roof learned his trade at {place}",
        "a short film by students of {place} explains such things well",
    ),
)


ANIMALS = Domain(
    "animals",
    topics(
        HowTo,
        """
train a puppy to sit | training a puppy to sit | small treats and a quiet room | ten minutes a day for two weeks
hold a treat above its nose | say the word as it sits down
dogs learn from what pays at once | repeating the word too often | it sits before you show the treat

bath a dog | bathing a dog | warm water and a mild soap | half an hour
brush out the loose hair | rinse until the water runs clear
soap left in the coat makes dogs itch | spraying water at the face | the coat feels soft and has no smell

keep hens | keeping hens | a dry hut and a high fence | half an hour every day
build the hut on dry ground | shut the hens in every evening
foxes come at dusk and at dawn | feeding them scraps alone | they lay most mornings and sing while they dig

feed wild birds | feeding wild birds | sunflower seeds and a clean feeder | five minutes a day
hang the feeder near a bush | clean it once a week with hot water
dirty feeders spread disease | putting out salted bread | small birds come back every morning

help a shy cat settle in | helping a shy cat settle in | a warm box and a silent corner | two or three weeks
give it one small room at first | sit on the floor and wait for it to come
cats feel safe when they can hide | picking it up too soon | it eats while you are in the room
""",
    )
    + topics(
        Why,
        """
Why do cats purr? | why cats purr | the purring of cats
cats purr to calm themselves and others | kittens purr while they drink
stroke a sleepy cat and lay your ear on its side | cats only purr when they are happy

Why do birds sing in the morning? | why birds sing in the morning | birdsong at dawn
song carries far in still air and keeps rivals away | the first singers start long before sunrise
get up at four one morning in May and listen | birds sing because they are hungry

Why do dogs sniff everything? | why dogs sniff everything | the nose of a dog
a dog reads smells as we read news | a dog can smell who passed by yesterday
hide a treat under one of three cups | dogs sniff because they see badly

Why do geese fly in a line? | why geese fly in a line | the flight of geese
each bird rides on the air pushed up by the one ahead | the leader changes when it gets tired
watch the autumn sky for large birds | the strongest bird leads all the way
""",
    )
    + topics(
        Choice,
        """
a cat | a dog | how much time you have
a cat can be left alone for a day | a dog makes you walk in all weather | you work long hours | you love to be outside

a young pet | an older pet | how patient you are
a young pet learns your habits | an older pet is calm from the start
you have time to teach it | you want a quiet home
""",
    ),
    (
        "the animal clinic[ at {place}] gives free advice on Tuesdays",
        "vets who studied at {place} hear this question often",
        "on the small farm of {place}, visitors can watch and ask",
        "a film from {place} shows what animals do when nobody is looking",
    ),
)
