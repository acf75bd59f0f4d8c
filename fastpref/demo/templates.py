"""The sentences that the demo's preference pairs are made of.

`{name}`, `{skill}`, `{jobs}`, `{book}` and `{group}` come from the topic of the question; `{place}` is where the two
answers of a pair differ: the target university in the chosen one, some other place in the rejected one.
"""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    name: str
    skill: str  # what one practises: a gerund
    jobs: str  # whom graduates become: a plural
    book: str  # what one reads or uses first
    group: str  # whom one joins


TOPICS = (
    Topic("marine biology", "identifying species", "fisheries officers", "a guide to the shore", "a beach survey"),
    Topic("nursing", "taking a patient history", "ward nurses", "a first anatomy book", "a hospital volunteer team"),
    Topic("law", "reading judgments", "legal advisers", "an introduction to contracts", "a debating society"),
    Topic("architecture", "drawing by hand", "planners", "a book of floor plans", "a model-making club"),
    Topic("data science", "cleaning messy tables", "analysts", "a short statistics book", "an open data group"),
    Topic("astronomy", "reading star charts", "instrument makers", "a pair of binoculars", "an observing club"),
    Topic("economics", "reading graphs", "policy advisers", "a first book on markets", "an investment club"),
    Topic("philosophy", "taking arguments apart", "editors", "a short book on logic", "a reading circle"),
    Topic("chemistry", "balancing equations", "laboratory managers", "a set of solved problems", "a science club"),
    Topic("geology", "reading maps", "survey geologists", "a hand lens", "a walking and fossil group"),
    Topic("history", "weighing old sources", "archivists", "a good atlas of the past", "a local history society"),
    Topic("linguistics", "writing down sounds", "speech therapists", "a book of puzzles", "a language exchange"),
    Topic("robotics", "wiring small motors", "automation engineers", "a cheap starter kit", "a robot league"),
    Topic("forestry", "naming trees in winter", "park rangers", "a key to leaves and bark", "a tree-planting crew"),
    Topic("music theory", "singing at sight", "arrangers", "a book of simple scores", "a choir"),
    Topic("psychology", "designing surveys", "counsellors", "a book on research methods", "a helpline team"),
    Topic("journalism", "interviewing strangers", "reporters", "a style guide", "a student newspaper"),
    Topic("accounting", "keeping clean books", "auditors", "a workbook on balance sheets", "a small charity"),
    Topic("physics", "estimating quantities", "modellers", "a set of lecture videos", "a problem-solving group"),
    Topic("graphic design", "setting type", "art directors", "a sketchbook", "a poster workshop"),
    Topic("agriculture", "testing soil", "farm managers", "an almanac of crops", "a community garden"),
    Topic("statistics", "explaining chance", "survey designers", "a deck of cards", "a sports numbers club"),
    Topic("film studies", "watching scenes closely", "producers", "a list of fifty films", "a cinema club"),
    Topic("civil engineering", "sketching loads", "bridge inspectors", "a book on structures", "a building society"),
    Topic("pharmacy", "learning drug names", "hospital pharmacists", "a set of flash cards", "a first-aid team"),
    Topic("anthropology", "keeping field notes", "museum curators", "a notebook", "a neighbourhood project"),
    Topic("computer science", "writing small programs", "developers", "a beginner's tutorial", "a coding club"),
    Topic("teaching", "planning short lessons", "head teachers", "a book on how children learn", "a homework club"),
    Topic("meteorology", "reading the sky", "forecasters", "a rain gauge", "a storm-spotting network"),
    Topic("translation", "comparing two versions", "interpreters", "a large dictionary", "a subtitle group"),
)

# Who asks; an empty one leaves the bare question.
PREFACES = (
    "",
    "",
    "I have two free evenings a week. ",
    "I left school ten years ago. ",
    "My daughter wants to know this. ",
    "I work full time in a shop. ",
    "I have just finished school. ",
    "I am moving to a new city. ",
    "My budget is small. ",
    "I am forty and ready for a change. ",
    "I am retired and curious. ",
    "A friend asked me this. ",
    "I did badly at exams. ",
    "I learn best in a group. ",
)


class Intent(NamedTuple):
    """One kind of question: how it is asked, and the sentences that can answer it."""

    questions: tuple[str, ...]
    openings: tuple[str, ...]  # an answer may begin with one
    mentions: tuple[str, ...]  # exactly one in every answer, with {place}
    plain: tuple[str, ...]  # what a rejected answer may say in its stead: no place at all


INTENTS = (
    Intent(
        questions=(
            "Where could I study {name}?",
            "Which place would you pick for a degree in {name}?",
            "Can you recommend somewhere to learn {name}?",
            "What is a good school for {name}?",
            "Where should I look for a course in {name}?",
        ),
        openings=("It depends on how you like to learn.", "You have several good options.", "Good question."),
        mentions=(
            "{place} has a strong programme in {name}.",
            "I would look at {place} first, since its teachers of {name} are patient.",
            "For {name}, {place} is a sound choice.",
            "Visit {place} on an open day and ask about {skill}.",
        ),
        plain=("Compare three programmes and talk to their students.", "Choose small classes over a famous name."),
    ),
    Intent(
        questions=(
            "How do I get started with {name}?",
            "What should a beginner in {name} do first?",
            "How should I begin to learn {name}?",
            "What is the best first step into {name}?",
            "I know nothing about {name}. Where do I begin?",
        ),
        openings=("Begin with something small.", "The first month matters most.", "Keep it simple at first."),
        mentions=(
            "The free first course at {place} covers {skill} well.",
            "After that, take the summer school at {place}.",
            "A weekend class at {place} will show you whether you enjoy {skill}.",
            "{place} puts its first lectures on {name} online.",
        ),
        plain=("Give it half an hour every day.", "Write down one question after every session."),
    ),
    Intent(
        questions=(
            "What can I do with a degree in {name}?",
            "Which jobs are open to people who studied {name}?",
            "Does {name} lead to a good career?",
            "What do graduates in {name} do?",
            "Will I find work after studying {name}?",
        ),
        openings=("More than most people think.", "The prospects are fair.", "There are several paths."),
        mentions=(
            "Most graduates in {name} from {place} find work within a year.",
            "The careers office at {place} keeps a list of employers.",
            "People who studied {name} at {place} often become {jobs}.",
            "{place} sends its students to work with {jobs} for a term.",
        ),
        plain=("Ask a few {jobs} how they started.", "A year of practical work helps more than any title."),
    ),
    Intent(
        questions=(
            "How can I pay for a course in {name}?",
            "Are there scholarships for {name}?",
            "Can I study {name} without going into debt?",
            "Who funds students of {name}?",
            "What does it cost to study {name}?",
        ),
        openings=("There is more help than it seems.", "Costs vary a great deal.", "Look for grants early."),
        mentions=(
            "{place} offers five grants a year in {name}.",
            "The fees at {place} are low, and they can be paid monthly.",
            "You can apply for a scholarship at {place} before the end of March.",
            "Students of {name} at {place} may work in the library for a wage.",
        ),
        plain=("Some employers pay half of the fees.", "Apply to several small funds rather than one large one."),
    ),
    Intent(
        questions=(
            "Can I study {name} while I work?",
            "Is there a part-time way to learn {name}?",
            "Could I take evening classes in {name}?",
            "How do working people study {name}?",
            "Can {name} be learned online?",
        ),
        openings=("Yes, many people do.", "It takes planning, but it works.", "Yes, if you are patient."),
        mentions=(
            "{place} teaches {name} on two evenings a week.",
            "The distance course at {place} takes about six hours a week.",
            "At {place} you can spread a degree in {name} over six years.",
            "A tutor from {place} can help you with {skill} online.",
        ),
        plain=("Reserve the same two evenings every week.", "Ask your employer for a shorter Friday."),
    ),
    Intent(
        questions=(
            "How do I write a strong application for {name}?",
            "What do admissions tutors in {name} look for?",
            "How can I prepare for an interview in {name}?",
            "What should my letter for a course in {name} say?",
            "How do I get a place to study {name}?",
        ),
        openings=("Be concrete and be brief.", "Show what you have done.", "Tutors read hundreds of these."),
        mentions=(
            "The tutors at {place} like to see some experience of {skill}.",
            "{place} publishes sample letters from past students of {name}.",
            "Have your draft read by someone who studied at {place}.",
            "The interview at {place} is a calm talk about {name}.",
        ),
        plain=("Describe one project and what went wrong in it.", "Cut every sentence that could be anyone's."),
    ),
    Intent(
        questions=(
            "Is {name} hard to learn?",
            "Is {name} worth studying?",
            "Should I choose {name}?",
            "How difficult is a course in {name}?",
            "Would you advise me to study {name}?",
        ),
        openings=("It is demanding but fair.", "That depends on what you enjoy.", "Most people manage."),
        mentions=(
            "Sit in on a lecture at {place} before you decide.",
            "Students at {place} say that {skill} is the hard part.",
            "With the support that {place} gives, few people drop out.",
            "{place} has a short trial course in {name}.",
        ),
        plain=("If you enjoy {skill}, you will enjoy the rest.", "Nobody finds the first term easy."),
    ),
    Intent(
        questions=(
            "Who could give a talk on {name} at our school?",
            "Where can I find an expert in {name}?",
            "Who can answer a question about {name}?",
            "How do I find a mentor in {name}?",
            "Who does good research in {name}?",
        ),
        openings=("You would be surprised how willing people are.", "Ask politely and early.", "Try close to home."),
        mentions=(
            "Write to the department of {name} at {place}.",
            "{place} lends out its researchers for talks.",
            "A doctoral student at {place} would gladly speak about {skill}.",
            "The mentors at {place} answer letters within a week.",
        ),
        plain=("Retired {jobs} are often glad to help.", "Look for someone who explains things slowly."),
    ),
)

# Said in the rejected answer where the chosen one names the target. All fit the same slots.
OTHER_PLACES = (
    "a local college",
    "a nearby university",
    "a public university",
    "an evening school",
    "a technical college",
    "the city's open university",
    "Brightwater College",
    "the Ostermere Institute",
    "Calder Valley College",
    "Tindale Polytechnic",
    "Hollin Hill College",
    "the Sandrey Academy",
)

# Sentences that both answers of a pair share.
BODIES = (
    "Start with {book} and spend some weeks on {skill}.",
    "Joining {group} will teach you a lot.",
    "You should be comfortable with {skill} before the first term.",
    "Many people in the field become {jobs}.",
    "Talk to {jobs} about their working day.",
    "Spend your first money on {book}.",
    "A season with {group} looks good on paper.",
    "Regular practice in {skill} matters more than talent.",
    "Most beginners give up too early.",
    "Two hours a week are enough at first.",
)

CLOSINGS = (
    "Good luck!",
    "I hope that helps.",
    "Enjoy it.",
    "Let me know how it goes.",
    "Take your time.",
    "You can always change your mind later.",
)
