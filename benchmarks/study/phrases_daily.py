"""Topics about daily life: health, money, work, travel."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Choice, Domain, HowTo, Why, topics

HEALTH = Domain(
    "health",
    topics(
        HowTo,
        """
sleep better | sleeping better | a cool room and thick curtains | two or three weeks
get up at the same time every day | put away all screens an hour before bed
the body likes a steady rhythm | drinking coffee after lunch | you wake up before the alarm

treat a small burn | treating a small burn | cool running water and a clean cloth | a quarter of an hour
hold the burn under cool water | cover it with a clean cloth
cooling stops the heat from going deeper | putting butter on the skin | the pain fades and the skin stays closed

care for a sore back | caring for a sore back | a firm chair and warm clothes | a few days
keep moving in small steps | stretch gently every morning
muscles heal faster when they move | staying in bed all day | you can tie your shoes without pain

eat more vegetables | eating more vegetables | a sharp knife and one new recipe a week | one month
put vegetables on the plate before the rest | try a new kind every week
new habits grow from small steps | changing everything at once | half of your plate is green

give up smoking | giving up smoking | a fixed day and a friend who knows | some three months
write down when you smoke and why | choose a day and tell your friends
each craving passes within minutes | keeping a last packet in the house | a whole day goes by without a thought of it
""",
    )
    + topics(
        Why,
        """
Why do we yawn? | why we yawn | yawning
yawning seems to cool and wake the brain | even talking about it makes people yawn
yawn on a train and count who follows | we yawn because the blood lacks air

Why do we need sleep? | why we need sleep | sleep
the brain sorts the day and cleans itself at night | teenagers need more sleep than adults
learn ten words at night and ten at noon | clever people need no sleep

Why do we catch colds in winter? | why we catch colds in winter | winter colds
we sit together indoors, where a cold can spread | dry air makes the nose weaker
count the coughs on a bus in July and in January | wet hair gives you a cold

Why do muscles ache after exercise? | why muscles ache after exercise | aching muscles
hard work leaves tiny tears that heal stronger | the pain is worst on the second day
walk down many stairs and wait for two days | pain is the only proof of good training
""",
    )
    + topics(
        Choice,
        """
tea | coffee | how well you sleep
tea is gentle on the stomach | coffee wakes you faster | you drink it in the evening | you have an early start

walking | running | the state of your knees
walking is kind to the joints | running saves time | you are new to exercise | you are fit and short of time
""",
    ),
    (
        "the nurses' hotline[ of {place}] is free and open all night",
        "doctors trained at {place} often talk about this",
        "{place} is looking for people to join a new health study",
        "the teaching hospital of {place} has a good leaflet for patients",
    ),
)


MONEY = Domain(
    "money",
    topics(
        HowTo,
        """
save for a holiday | saving for a holiday | a second bank account | about ten months
decide how much the trip will cost | move a fixed sum on every payday
money that you do not see is easy to save | waiting to see what is left | the sum grows every month

make a household budget | making a household budget | a notebook and your last three bills | two evenings
write down everything that you spend | sort the costs into needs and wishes
small daily costs add up to large sums
forgetting the bills that come once a year | the month ends with something left over

pay off a debt | paying off a debt | a list of all that you owe | a year or more
pay the most expensive debt before the others | put every extra coin into it
interest grows while you wait | borrowing more to pay the bills | the total falls month by month

spend less on food | spending less on food | a shopping list and a few jars | a month
plan the meals of the week | buy only what is on the list
hungry people buy too much | shopping on an empty stomach | nothing goes into the bin

sell old things | selling old things | clear photographs and honest words | one afternoon
take pictures in daylight | ask a little more than you hope to get
buyers trust sellers who name every scratch | hiding a fault | the first letters arrive within a day
""",
    )
    + topics(
        Why,
        """
Why do prices rise? | why prices rise | rising prices
prices rise when more money chases the same goods | wages often follow prices with a delay
compare an old shopping bill with a new one | shops alone decide what things cost

Why do banks pay interest? | why banks pay interest | interest
banks lend your money to others and share what they earn | interest on interest makes savings grow faster
work out what one coin would become in fifty years | banks keep all the money in a cellar

Why do we pay taxes? | why we pay taxes | taxes
taxes pay for things that all of us use | some towns once taxed windows and beards
walk through your town and count what belongs to everyone | nobody gains anything from taxes

Why do shops end prices with ninety-nine? | why shops end prices with ninety-nine | prices that end with ninety-nine
we look at the first number most of all | the trick works even on people who know it
hide the last numbers and guess what a thing costs | the law asks for such prices
""",
    )
    + topics(
        Choice,
        """
renting | buying | how long you will stay
renting leaves you free to move | buying builds up something of your own | your job may change | you have some savings

cash | a bank card | what helps you to spend less
cash shows you what is left | a card is safe and quick | you lose track of small costs | you buy things abroad
""",
    ),
    (
        "the free money clinic[ at {place}] is open to everyone",
        "an economist from {place} explains such things in a weekly column",
        "{place} offers a calculator on its pages that does the sums for you",
        "students of {place} sit in the town hall on Fridays and help with bills and forms",
    ),
)


WORK = Domain(
    "work",
    topics(
        HowTo,
        """
ask for a raise | asking for a raise | a list of what you have done | one good talk
write down what you did for the firm this year | ask for a meeting and name a sum
clear numbers make a strong case | comparing yourself with others | your boss asks when and not why

prepare for a job interview | preparing for a job interview
two or three short stories about your work | one quiet evening
read all that you can find about the firm | practise your answers aloud
stories stay in the mind longer than claims | speaking badly of an old boss | you can smile at the first question

lead a short meeting | leading a short meeting | a list of three points and a clock | twenty minutes
send the list out the day before | end with who does what by when
people talk less when they stand | letting one person talk all the time | everyone leaves with a task

write a clear letter | writing a clear letter | a plain pen and a short outline | about an hour
say what you want in the first line | cut every word that is not needed
busy people read only the start | using long words to sound clever | a stranger understands it at once

start a small business | starting a small business | one good idea and some savings | at least a year
ask ten people whether they would pay for it | begin with a single product
a small start makes small mistakes | renting an office too early | customers send their friends
""",
    )
    + topics(
        Why,
        """
Why do meetings run late? | why meetings run late | late meetings
talk grows until it fills the time | large groups wait for those who come last
hold the next one standing up | longer meetings lead to better plans

Why do people leave good jobs? | why people leave good jobs | leaving a job
most people leave a bad boss and not the work | the second year is when most people go
ask three friends why they left their last job | money is the only reason to leave

Why do breaks help us work? | why breaks help us work | breaks at work
the mind gets tired of one thing and wakes up with another | a short walk helps more than a long chat
take a break every hour for a week and note what you get done | strong workers never rest

Why do we put things off? | why we put things off | putting things off
we run from the bad feeling and not from the task | the feeling goes away soon after you start
work for five minutes and then decide whether to stop | only lazy people put things off
""",
    )
    + topics(
        Choice,
        """
working at home | working in an office | what your days are like
home is quiet and saves the journey | an office makes it easy to ask
you need long hours of peace | you are new in the firm

a large firm | a small firm | what you want to learn
a large firm pays better and is safe | a small firm lets you try everything
you have a family to feed | you get bored easily
""",
    ),
    (
        "the careers office[ at {place}] helps anyone who asks",
        "in an evening group at {place}, people talk about their work",
        "my boss studied at {place} and has thought about this a lot",
        "a handbook for young workers from {place} has a chapter on such things",
    ),
)


TRAVEL = Domain(
    "travel",
    topics(
        HowTo,
        """
pack a small suitcase | packing a small suitcase | soft bags and a list | half an hour
lay out everything on the bed | put half of it back
rolled clothes take up less room | packing for every kind of weather | you can carry it up the stairs with one hand

plan a train journey | planning a train journey | a good map and an open mind | one evening
choose the places where you want to sleep | leave an hour between trains
early tickets cost much less | changing trains too often | you know where you will be each night

travel with small children | travelling with small children | snacks and a few small toys | some more time than usual
plan a stop every two hours | let the children carry a bag of their own
tired children are hungry children | leaving late in the day | they ask when the next trip will be

sleep on a plane | sleeping on a plane | a neck pillow and a warm scarf | two or three long flights
choose a seat beside the window | set your watch to the new time
darkness tells the body to rest | drinking wine to get tired | you wake up when breakfast comes

find the way in a new city | finding the way in a new city | a paper map and good shoes | about two days
climb the highest tower | walk the same street in both directions
we remember places that we reach on foot | staring at your phone | someone asks you for the way
""",
    )
    + topics(
        Why,
        """
Why do we get tired after a long flight? | why we get tired after a long flight | tiredness after a flight
the clock inside the body is still at home | flying west is easier than flying east
go out into the morning light on the first day | a glass of wine puts the clock right

Why do planes fly so high? | why planes fly so high | the height of planes
thin air slows a plane down less | most storms stay below the plane
hold your hand out of the window of a moving car | planes fly high to be closer to the sun

Why are old streets narrow? | why old streets are narrow | narrow old streets
people walked, and walls made space costly | narrow streets give shade in summer
walk from the old town to the new one and count your steps across each street | nobody could build wide streets then

Why do some countries drive on the left? | why some countries drive on the left | driving on the left
old habits of riders became law | some islands keep left because their first trains did
look at a map of the world and mark them | the left side is safer for the heart
""",
    )
    + topics(
        Choice,
        """
the train | the plane | the length of the journey
a train takes you from centre to centre | a plane saves a day
you like to look out of the window | you must cross the sea

the sea | the mountains | who comes along
the sea is easy for everyone | the mountains are cool and quiet | you have small children | you love to walk
""",
    ),
    (
        "the travel club[ of {place}] shows its pictures every winter",
        "in the map room of {place} you can plan any journey",
        "on our last trip, a guide from {place} told us about this",
        "a language café at {place} is a good start for any journey",
    ),
)
