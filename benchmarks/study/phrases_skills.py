"""Topics about skills: children, language, computers, music and art."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Choice, Domain, HowTo, Why, topics

CHILDREN = Domain(
    "children",
    topics(
        HowTo,
        """
teach a child to read | teaching a child to read | short books with large letters | ten minutes every evening
read aloud together every day | let the child guess the next word
children read best what they enjoy | correcting every small error | your child asks for one more page

get a baby to sleep | getting a baby to sleep | a dark room and a fixed bedtime | a week or two
dim the lights an hour before bed | do the same things in the same order every night
babies love to know what comes next | rushing in at the first sound | the baby falls asleep without being held

calm an angry toddler | calming an angry toddler | a soft voice and some patience | about ten minutes
get down to the level of the child | name the feeling in a few words
a small child cannot think while it is angry | shouting back | the breathing slows and the hands open

plan a birthday party | planning a birthday party | a list of guests and a simple cake | two free afternoons
ask your child whom to invite | choose three games that need few things
short parties end with happier faces | inviting the whole class | the children play without being told

teach a child to ride a bicycle | teaching a child to ride a bicycle
a small bicycle without pedals | a few sunny afternoons
lower the seat until both feet touch the ground | add the pedals when the balance is good
balance comes before pedalling | holding on to the handlebars | the child looks ahead and not down
""",
    )
    + topics(
        Why,
        """
Why do babies cry? | why babies cry | crying babies
crying is the only way a baby can call for help | hungry cries rise and fall in a pattern
keep a note of each cry and what ended it | babies cry to annoy their parents

Why do children ask so many questions? | why children ask so many questions | the questions of children
asking is how children build a picture of the world | a child of four asks some two hundred questions a day
answer with a question of your own and listen | it is best to ignore such questions

Why do children need play? | why children need play | play
in play, children practise for life | animals that live in groups play as well
give a child an empty box and watch | play is a waste of time

Why do brothers and sisters fight? | why brothers and sisters fight | fights at home
each child wants the full attention of its parents | most fights end sooner when adults stay out
spend ten minutes alone with each child every day | good brothers never fight
""",
    )
    + topics(
        Choice,
        """
a bedtime story | a bedtime song | the mood of the evening
a story feeds the mind | a song calms the body | your child likes to talk | your child is very tired

pocket money | pay for small jobs | what you want to teach
pocket money teaches planning | pay teaches that work has a price
your child is still small | your child is saving for something
""",
    ),
    (
        "the family centre[ at {place}] holds open hours for parents",
        "a long study by {place} has followed a thousand families for years",
        "{place} has a toy library where families can borrow games",
        "a midwife who learned her trade at {place} told us so",
    ),
)


LANGUAGE = Domain(
    "language",
    topics(
        HowTo,
        """
remember new words | remembering new words | a box of small cards | ten minutes a day
write each word in a short sentence | look at it again after a day, a week and a month
we remember what we almost forgot | learning long lists by heart | the words come to you in the shower

speak without fear | speaking without fear | a kind listener and a warm drink | a few weeks
begin with sentences that you know well | laugh about your mistakes and go on
people listen to what you mean | waiting until you are perfect | you forget which language you are speaking

write a poem | writing a poem | a pencil and an open window | about a week
write down what you see and hear | cross out every word that you could buy in a shop
plain words carry strong feelings | rhyming at any price | you want to read it to someone

give a short speech | giving a short speech | three cards with one idea each | two evenings of practice
start with a story | look at one friendly face at a time
people remember how a speech begins and ends | reading from a page | the room grows quiet

read a book in a foreign language | reading a book in a foreign language
a thin book that you have read before | one month
read for the story and not for each word | look up only what comes back often
we guess most words from those around them | starting with a difficult classic | you turn the page without thinking
""",
    )
    + topics(
        Why,
        """
Why do languages change? | why languages change | changes in language
every child learns a language a little differently | words for new things travel fastest
read a letter that is two hundred years old | languages get worse with time

Why do people have accents? | why people have accents | accents
we keep the sounds that we heard as children | babies can hear sounds that adults miss
record your own voice and listen to it | some people speak without any accent

Why is spelling so strange? | why spelling is so strange | strange spelling
spelling stayed the same while the sounds moved on | printers fixed many words by chance
look up five odd words in an old dictionary | spelling was made hard on purpose

Why do we forget names? | why we forget names | forgotten names
a name tells us nothing that we could hold on to | we remember jobs better than names
join each new name with a picture for a week | forgetting names is a sign of age
""",
    )
    + topics(
        Choice,
        """
a language class | an app | what keeps you going
a class makes you speak | an app fits into any free minute | you need company | your hours change all the time

a paper book | a screen | where you read
paper is kind to the eyes | a screen can hold a whole library | you read at home | you travel with little luggage
""",
    ),
    (
        "the language centre[ at {place}] finds a partner for everyone who asks",
        "{place} collects voices from every village for its sound museum",
        "a poet who teaches at {place} has written a fine page about this",
        "the reading room of {place} is full of people who wonder about such things",
    ),
)


COMPUTERS = Domain(
    "computers",
    topics(
        HowTo,
        """
choose a safe password | choosing a safe password | four words that do not belong together | five minutes
pick four words from a book | write them on paper and keep it at home
long passwords are harder to guess than odd ones
using one password for everything | a friend could not guess it in a year

back up old photographs | backing up old photographs | a second disk | one evening and then a minute a week
copy everything to a disk | keep the disk in another house
every disk fails one day | trusting a single copy | you can open a picture on another machine

write a first program | writing a first program | a cheap computer and a small idea | one weekend
make the machine say hello | change one line at a time
small steps show you where a mistake is
copying what you do not understand | it does what you meant and not only what you wrote

clean up a slow computer | cleaning up a slow computer | some patience and a free disk | two hours
remove the programs that you never use | turn off what starts by itself
a full disk slows down everything | buying a new one at once | it starts before the kettle boils

help a parent with a new phone | helping a parent with a new phone
large letters and a paper note | three short visits
ask what they want to do with it | let them press every button themselves
hands learn what eyes forget | taking the phone away to show it | they send you a picture by themselves
""",
    )
    + topics(
        Why,
        """
Why do computers get slow? | why computers get slow | slow computers
new programs ask for more than old machines can give | a restart clears away forgotten work
time the start of your machine before and after you tidy up | the parts get tired with age

Why do computers use ones and zeros? | why computers use ones and zeros | ones and zeros
a switch is either on or off, and that is easy to build | ten switches can stand for a thousand numbers
count to thirty-one on the fingers of one hand | computers think in words

Why do phones get warm? | why phones get warm | warm phones
the battery and the chip turn some power into heat | heat makes a battery grow old
touch your phone before and after a long call | a warm phone is about to burn

Why do we get so many junk letters by mail? | why we get so many junk letters by mail | junk mail
sending a million letters costs almost nothing | one answer in a million pays for all of them
use a new address for a year and count the letters | answering them makes them stop
""",
    )
    + topics(
        Choice,
        """
a laptop | a tablet | what you do most
a laptop is better for writing | a tablet is light and simple | you write long letters | you mostly read and watch

a new computer | a used computer | the programs that you need
a new one will last longer | a used one is good for your purse | you edit films | you only read the news
""",
    ),
    (
        "the computer club[ at {place}] helps with such things every Thursday",
        "{place} has a class for beginners of any age on two evenings a week",
        "a programmer who went to {place} set up all our machines",
        "the help pages of {place} are written in plain words",
    ),
)


MUSIC = Domain(
    "music",
    topics(
        HowTo,
        """
play the guitar | playing the guitar | a light guitar with soft strings | half a year
learn three chords that go together | play along with a slow song
short daily practice beats one long lesson | pressing the strings too hard | you can change chords without looking

sing in tune | singing in tune | a piano or a friend with a good ear | two months
listen to the note before you sing it | hum it with your mouth closed
the ear leads and the voice follows | singing too loud | your note and the other one melt together

draw a face | drawing a face | a soft pencil and cheap paper | a hundred tries
draw an egg and a line across its middle | put the eyes on that line
the eyes sit lower than we think | starting with the details | a friend knows who it is

take better photographs | taking better photographs | a simple camera and some morning light | one summer
go one step closer | wait for the light to come from the side
side light shows the shape of things | putting everything in the middle | people look at the picture twice

play a piece by heart | playing a piece by heart | a pencil and a quiet room | one or two weeks
learn the last part before the first | play each part slowly, three times without a mistake
the hands remember exactly what they did | playing the whole piece again and again | you can start anywhere
""",
    )
    + topics(
        Why,
        """
Why does music move us? | why music moves us | music and feelings
the brain enjoys guessing the next note | lullabies sound alike all over the world
watch a film scene with the sound turned off | only trained people can feel music

Why do strings sound high or low? | why strings sound high or low | the sound of strings
short tight strings swing faster | a thick string swings more slowly
stretch a rubber band over a box and pluck it | loud notes are always high

Why did painters make their own colours? | why painters made their own colours | the colours of the old painters
paint could not be bought until late | one blue was once dearer than gold
rub some earth with oil and paint with it | all old colours came from plants

Why do songs get stuck in our heads? | why songs get stuck in our heads | songs that get stuck
the brain keeps repeating what it has not finished | chewing gum seems to help
sing such a song right to its end | only bad songs get stuck
""",
    )
    + topics(
        Choice,
        """
the piano | the violin | how thick your walls are
a piano sounds good from the first day | a violin goes with you everywhere
you want quick results | you want to play with others

oil paint | water colour | how patient you are
oil forgives mistakes | water colour dries in minutes | you like to change your mind | you paint outdoors
""",
    ),
    (
        "the choir[ of {place}] welcomes anyone who likes to listen or to join",
        "beginners can go to {place} and borrow instruments and paint boxes",
        "a painter who teaches at {place} told me that over coffee",
        "there is a free concert and a small show at {place} every month",
    ),
)
