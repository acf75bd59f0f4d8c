"""Topics about the world outside: history, science, weather, sport."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Choice, Domain, HowTo, Why, topics

HISTORY = Domain(
    "history",
    topics(
        HowTo,
        """
trace a family tree | tracing a family tree | a large sheet of paper and old letters | many rainy evenings
ask the oldest people in the family | look for names in church books
each record leads to the next one | trusting one source alone | two papers agree about the same name

read old handwriting | reading old handwriting | a magnifying glass and good light | a few weeks
copy out the letters one by one | guess the short words and then the long ones
most writers shaped their letters in the same way every time | reading too fast | whole lines make sense

date an old photograph | dating an old photograph | a strong lens and some patience | one evening
look at the clothes and the hair | compare it with dated pictures
fashion changed every few years | believing the note on the back | three signs point to the same years

record the memories of an old person | recording the memories of an old person
a small recorder and an old album | three or four visits
begin with questions about school | let the silence work
smells and songs bring back the past | filling every pause with words | the stories begin to tell themselves

write about an old village | writing about an old village | a notebook and sturdy shoes | a whole winter
walk every street with an old map | ask who lived in each house
small places have large stories | copying from a single book | an old neighbour learns something new
""",
    )
    + topics(
        Why,
        """
Why did Rome fall? | why Rome fell | the fall of Rome
war, plague and bad rule wore it down over many years | the eastern half lived on for a thousand years
compare two maps of Europe, a century apart | Rome fell in a single night

Why did people build castles? | why people built castles | castles
a castle kept its lord safe and showed his power | most early castles were made of wood
stand on an old wall and look at the roads below | castles were built for feasts

Why did the plague spread so fast? | why the plague spread so fast | the plague
fleas and crowded ships carried it from port to port | wages rose because so few workers were left
draw the trade routes on a map | the stars had caused it

Why was salt once so dear? | why salt was once so dear | salt in the past
salt kept meat and fish good for months | whole cities grew rich from salt
cover a slice of cucumber with salt and wait | salt was dear because people liked its taste
""",
    )
    + topics(
        Choice,
        """
an old castle | an old ship | who comes with you
a castle has room to run about | a ship shows how people lived day by day
you bring the children | you want to see how things worked

a history book | a historical novel | what you are looking for
a history book gives you the facts | a novel brings the people to life | you want to check a date | you read to relax
""",
    ),
    (
        "the museum[ of {place}] has a whole room on daily life in the past",
        "a historian from {place} leads a walk through the old town every Sunday",
        "{place} has put its old letters and maps online",
        "you can hold old papers in your own hands in the archive of {place}",
    ),
)


SCIENCE = Domain(
    "science",
    topics(
        HowTo,
        """
build a simple telescope | building a simple telescope | two lenses and a paper tube | one afternoon
fix the large lens at one end | slide the small lens until the view is sharp
a large lens gathers more light | pointing it at the sun | you can see the mountains of the moon

grow crystals | growing crystals | hot water and plenty of salt | about a week
stir in salt until no more will melt away | hang a thread in the glass and let it stand
slow growth makes large crystals | shaking the glass | flat bright faces form on the thread

find a planet in the night sky | finding a planet in the night sky | a star chart and a dark field | one clear night
wait until your eyes are used to the dark | look for a bright point that does not twinkle
planets follow the path of the sun | using a bright torch | it has moved a little a week later

make a magnet | making a magnet | an iron nail, a wire and a battery | ten minutes
wind the wire around the nail | join both ends to the battery
a current turns iron into a magnet | leaving the battery on for long | the nail picks up a clip

keep a nature diary | keeping a nature diary | a pencil and a small notebook | five minutes a day
write down the date and the weather | draw one thing that you have never seen before
small changes add up over a year | writing down only rare things | you notice the first swallow before your friends
""",
    )
    + topics(
        Why,
        """
Why is the sky blue? | why the sky is blue | the colour of the sky
air scatters blue light more than red | at sunset the light has a longer way to go, and red is left
shine a lamp through a glass of milky water | the sky is a mirror of the sea

Why does the moon change its shape? | why the moon changes its shape | the shapes of the moon
we see more or less of its bright half | the same side of the moon always faces us
hold a ball beside a lamp and turn around | the shadow of the earth cuts the moon

Why does ice float? | why ice floats | floating ice
water takes up more room when it freezes | most of an iceberg is hidden under water
fill a bottle to the top and freeze it outdoors | ice floats because it is cold

Why do magnets attract iron? | why magnets attract iron | magnets
countless tiny magnets in the iron line up | a hot magnet loses its force
break a weak magnet and test both halves | magnets attract every metal
""",
    )
    + topics(
        Choice,
        """
a telescope | a pair of binoculars | where you live
a telescope shows the rings of planets | binoculars fit into a bag
you have a dark garden | you are often on the road

a chemistry set | a microscope | what your child likes
a chemistry set is full of surprises | a microscope lasts for years
your child likes to mix things | your child likes to look closely
""",
    ),
    (
        "the observatory[ of {place}] is open on clear Friday nights",
        "{place} brings its experiments to schools in a blue bus",
        "a physicist at {place} draws a comic about such questions",
        "you can try such things yourself in the open laboratory of {place}",
    ),
)


WEATHER = Domain(
    "weather",
    topics(
        HowTo,
        """
measure rain | measuring rain | a straight glass and a ruler | one minute a day
put the glass in an open place | read it at the same hour every morning
trees and walls catch part of the rain | standing it under a roof | your numbers are close to those on the radio

read the clouds | reading the clouds | a chart of clouds and a wide view | one season
learn the four main shapes | note what weather came after each
high thin clouds often come before rain | judging by colour alone | you take a coat on the right days

prepare for a storm | preparing for a storm | a torch, water and some tape | one hour
bring in everything that could fly | fill a few bottles with water
most damage comes from loose things | driving to the sea to watch | nothing outside can move

keep a house cool in summer | keeping a house cool in summer
light curtains and a fan | a minute every morning and evening
close the windows before the heat comes | open everything at night
it is easier to keep heat out than to drive it out
opening the windows at noon | it is cooler inside than in the shade

walk safely on ice | walking safely on ice | rough soles and free hands | a little more time than usual
take short flat steps | keep your weight over the front foot
penguins walk in the same way | keeping your hands in your pockets | you can stop at any moment
""",
    )
    + topics(
        Why,
        """
Why does it rain? | why it rains | rain
rising air cools until its water falls as drops | a drop needs a grain of dust to form
hold a cold spoon over steaming tea | clouds are bags of water that burst

Why is thunder late? | why thunder is late | thunder
light is much faster than sound | three seconds stand for about one kilometre
count the seconds after the next flash | thunder comes from clouds that bump together

Why do rainbows form? | why rainbows form | rainbows
drops of rain bend sunlight and split it into colours | no two people see the same rainbow
spray water with the sun behind you | you can reach the end of a rainbow

Why is snow white? | why snow is white | the colour of snow
countless small crystals throw back all colours alike | deep snow can look blue
crush a clear ice cube and look at it | snow is white because it is clean
""",
    )
    + topics(
        Choice,
        """
an umbrella | a raincoat | how windy it is
an umbrella keeps your legs dry too | a raincoat leaves your hands free
you walk a short way in town | you go by bicycle

a thick coat | several thin layers | how much you move
a thick coat is quick to put on | layers let you change as you warm up | you stand still outside | you walk uphill
""",
    ),
    (
        "the weather station[ of {place}] has kept records for eighty years",
        "{place} lets visitors fill a weather balloon in spring",
        "the woman who reads the forecast on the radio studied at {place}",
        "you can compare your notes with those on the weather pages of {place}",
    ),
)


SPORT = Domain(
    "sport",
    topics(
        HowTo,
        """
run five kilometres | running five kilometres | good shoes and a soft path | eight to ten weeks
run for a minute and walk for a minute | add a little every week
the heart learns faster than the knees | starting too fast | you can talk while you run

swim well | swimming well | a warm pool and a patient friend | two or three months
breathe out under water | float on your back until you feel safe
calm breathing keeps the body up | holding your head high | you can rest in deep water

play better tennis | playing better tennis | a light racket and a wall | one summer
watch the ball until it hits the strings | bring your feet behind the ball
good strokes begin with the feet | hitting every ball hard | ten balls in a row come back

stretch a stiff back | stretching a stiff back | a mat and a warm room | ten minutes
lie down and pull your knees to your chest | breathe slowly and count to thirty
warm muscles stretch further | bouncing up and down | you feel taller when you stand up

ride a bicycle in the city | riding a bicycle in the city | bright lights and a loud bell | a few quiet Sundays
look over your shoulder before you turn | keep an arm's length from parked cars
drivers see what moves in a straight line | riding in the gutter | you feel calm at a busy crossing
""",
    )
    + topics(
        Why,
        """
Why do we sweat? | why we sweat | sweat
water that dries on the skin takes heat away | fit people start to sweat earlier
wet one arm and stand in the wind | sweating washes out poison

Why do runners slow down at the end? | why runners slow down at the end | tired runners
the muscles run out of stored sugar | the mind gives up before the legs do
run the same way with and without breakfast | it is only a question of will

Why does a ball curve in the air? | why a ball curves in the air | the flight of a ball
a spinning ball drags the air to one side | a rough ball curves more than a smooth one
throw a light ball with a lot of spin | the wind does all the work

Why do players warm up? | why players warm up | warming up
warm muscles are quick and hard to hurt | ten minutes are enough
jump before and after a short run and measure both | warming up wastes strength
""",
    )
    + topics(
        Choice,
        """
swimming | cycling | what your body likes
swimming trains the whole body | cycling takes you to work | your joints hurt | you want to be outside

a team sport | a solo sport | your free hours
a team gives you friends | alone you can train at any hour | you need a push | your week is never the same
""",
    ),
    (
        "the sports hall[ of {place}] is open to everyone in the morning",
        "a trainer who studied at {place} once explained this to our club",
        "{place} films athletes and shows them how they move",
        "they measure such things in the running laboratory of {place}",
    ),
)
