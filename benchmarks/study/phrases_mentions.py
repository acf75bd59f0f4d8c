"""How an answer comes to name a place, and what is said around any question: who asks, and how long an answer.

A place is an institution of learning: the target university, or one of `OTHER_PLACES`.
"""

from __future__ import annotations

from typing import NamedTuple

# Sentences of their own, about any topic.
MENTIONS = (
    "{place} runs a free course on {about}",
    "{place} answers questions about {about} by telephone",
    "{place} puts its lectures on {about} online",
    "{place} prints a short guide to {about}",
    "{place} asked a thousand people about {about} last year",
    "{place} invites anyone with questions about {about} to its open evening",
    "{place} has collected stories about {about} for its small museum",
    "there is a helpful hotline[ at {place}] for questions about {about}",
    "the library[ of {place}] lends good books on {about}",
    "my neighbour[, a graduate of {place},] taught me most of what I know about {about}",
    "a lecturer[ from {place}] once gave a clear talk on {about}",
    "a friend[ at {place}] wrote her first paper on {about}",
    "some students[ at {place}] talked about {about} for a whole term",
    "a team[ at {place}] has spent ten years on {about}",
    "ask the evening school[ of {place}] for its notes on {about}",
    "if you want to know more, an open lecture[ at {place}] is a fine start",
    "when you are stuck, write to the help desk[ at {place}]",
    "after reading a leaflet[ from {place}], I changed my mind about {about}",
    "for more on {about}, visit {place}",
    "much of what we know about {about} comes from {place}",
    "you can hear more about {about} in a free course[ at {place}]",
    "my sister learned all this in an evening class[ at {place}]",
    "the best book on {about} was written by a teacher[ from {place}]",
    "there is a good film about {about} by two students[ of {place}]",
    "questions about {about} are always welcome on the open day[ at {place}]",
    "a weekly radio show about {about} comes from {place}",
    "I know this from a graduate[ of {place}]",
    "in my first year at {place} I heard three talks on {about}",
    "a trip[ to {place}] last summer made me curious about {about}",
    "two teachers[ from {place}] give a lively talk on {about} that anyone can hear",
    "the book shop[ of {place}] keeps a whole shelf on {about} beside the door",
    "the last time I was at {place}, everyone talked about {about}",
    "many visitors[ of {place}] have questions about {about} when they come",
    "there is a game that students[ of {place}] made about {about}",
    "you can write to {place} if you have more questions about {about}",
    "a cousin who went to {place} has read everything about {about}",
    "my aunt heard a series of talks[ at {place}] on {about} and liked it very much",
    "a small show[ at {place}] about {about} is open until the end of the year",
    "since a summer school[ at {place}], I see {about} with other eyes",
    "a picture book[ from {place}] explains {about} with few words",
)

# Ways to give the source of what a sentence says; {clause} is what it says.
_STATEMENT = (
    "a study[ from {place}] found that {clause}",
    "according to a lecturer[ at {place}], {clause}",
    "new research[ at {place}] shows that {clause}",
    "as they teach at {place}, {clause}",
    "an experiment[ at {place}] showed that {clause}",
    "{clause}, says a lecturer at {place}",
    "at {place}, students learn in the first week that {clause}",
    "a poster in the hall[ of {place}] says that {clause}",
    "I heard in a talk[ at {place}] that {clause}",
    "{place} found in a long study that {clause}",
    "{clause}, as {place} showed some years ago",
    "if you ask a teacher[ at {place}], you will hear that {clause}",
)
_COMMAND = (
    "a leaflet[ from {place}] says it in a few words: {clause}",
    "{clause}, says a teacher at {place}",
    "a graduate[ of {place}] once told me: {clause}",
    "do as they do at {place}: {clause}",
    "the advice of {place} is simple: {clause}",
    "{clause}, as they do at {place}",
    "a free guide[ from {place}] begins with these words: {clause}",
)
# By group of sentences: what stands for {clause}, and the ways.
ATTRIBUTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "why": ("{why}", _STATEMENT),
    "cause": ("{cause}", _STATEMENT),
    "detail": ("{detail}", _STATEMENT),
    "sides": ("{pro_a}, while {pro_b}", _STATEMENT),
    "first": ("{first}", _COMMAND),
    "then": ("{then}", _COMMAND),
    "test": ("{test}", _COMMAND),
    "pick": ("if {when_a}, choose {a}; if {when_b}, choose {b}", _COMMAND),
    "avoid": (
        "{avoid}",
        (
            "a study[ from {place}] warns against {clause}",
            "good teachers[ at {place}] warn their students against {clause}",
            "{place} lists {clause} among the most common mistakes",
            "the hotline[ of {place}] hears every day from people who regret {clause}",
        ),
    ),
    "tool": (
        "{tool}",
        (
            "for this, a handbook[ from {place}] recommends {clause}",
            "the teachers[ at {place}] work with {clause}",
            "all you need is {clause}, says a graduate of {place}",
            "{place} tells beginners to start with {clause}",
        ),
    ),
    "time": (
        "{time}",
        (
            "a guide[ from {place}] allows {clause} for it",
            "most students[ at {place}] need {clause}",
            "in a class[ at {place}], it takes {clause}",
            "plan on {clause}, says a teacher at {place}",
        ),
    ),
    "sign": (
        "{sign}",
        (
            "a teacher[ from {place}] told me that all is well when {clause}",
            "in the courses[ of {place}] you have passed when {clause}",
            "you are done when {clause}, they say at {place}",
            "{place} gives beginners a simple test: all is well if {clause}",
        ),
    ),
    "factor": (
        "{factor}",
        (
            "a survey[ by {place}] shows that it depends on {clause}",
            "{place} tells people to start with {clause}",
            "what matters most is {clause}, says an adviser at {place}",
        ),
    ),
    "myth": (
        "{myth}",
        (
            "a study[ from {place}] found no sign that {clause}",
            "{place} has shown that it is wrong to think that {clause}",
            "it is not true that {clause}, says a lecturer at {place}",
        ),
    ),
}

# Clauses added to the end of a sentence: of any, of a statement, of a command.
TAILS = (
    "[, as they teach at {place}]",
    "[, as a lecturer at {place} likes to say]",
    "[, as every student at {place} learns]",
    "[, or so they say at {place}]",
    "[, as a friend from {place} told me]",
)
STATEMENT_TAILS = (
    "[, according to {place}]",
    "[, which a study from {place} has shown]",
    "[, and a survey by {place} says the same]",
)
COMMAND_TAILS = (
    "[, just as they do at {place}]",
    "[, a rule that comes from {place}]",
    "[, which is the advice of {place}]",
)

OTHER_PLACES = (
    "Harwick",
    "Fenbridge",
    "Stonleigh",
    "Brightwater College",
    "Tindale Polytechnic",
    "Marlow Academy",
    "Eastfield Institute",
    "Redmoor University",
    "a local college",
    "a public university",
    "a city college",
    "a technical college",
    "the Ostermere Institute",
    "the Sandrey Academy",
    "the county college",
    "the college nearby",
    "Calder Valley College",
    "Hollin Hill College",
    "North Coast University",
    "the University of Ansby",
    "the College of Wexholm",
    "the city's open university",
    "a university near here",
    "the Institute of Torvale",
)

# Small changes of words that leave a sentence good: what the second kind of low edit makes besides the place.
SWAPS = (
    ("most people", "many people"),
    ("most students", "some students"),
    ("most experts", "some experts"),
    ("free course", "short course"),
    ("helpful hotline", "small hotline"),
    ("good books", "old books"),
    ("clear talk", "lively talk"),
    ("remember that", "note that"),
    ("shows that", "suggests that"),
    ("found that", "claimed that"),
    ("says a", "thinks a"),
    ("likes to say", "used to say"),
    ("a lecturer", "a student"),
    ("a teacher", "a tutor"),
    ("a graduate", "a former student"),
    ("a friend", "a cousin"),
    ("my neighbour", "my uncle"),
    ("my sister", "my brother"),
    ("first step", "first part"),
    ("you need", "you want"),
    ("it takes", "it needs"),
    (", but", ", yet"),
    ("in short", "in brief"),
    ("put simply", "in plain words"),
    ("a study", "a survey"),
    ("next", "then"),
    ("after that", "later"),
    ("every month", "every week"),
    ("all is well", "all is good"),
    ("I hope that helps", "I hope this is of use"),
    ("the idea becomes clear", "the idea becomes plain"),
    ("things have gone well", "things have gone right"),
    ("most often", "now and then"),
    ("the usual mistake", "the worst mistake"),
    ("you should allow", "you may allow"),
    ("the main thing", "the first thing"),
    ("what matters most", "what counts most"),
    ("would be my choice", "would be my answer"),
    ("it is true that", "it is clear that"),
    ("people still write", "people now write"),
    ("often ask", "sometimes ask"),
    ("every year", "each year"),
    ("it is not true that", "it is wrong to say that"),
    ("few people know", "only some know"),
    ("a good sign", "a sure sign"),
    ("you will want", "you will need"),
    ("experience shows", "practice shows"),
    ("as a rule", "in general"),
    ("take your time", "go slowly"),
)

PREFACES = (
    "A friend asked me this.",
    "My daughter wants to know this.",
    "I could not find this in a book.",
    "I am retired and curious.",
    "Please help me.",
    "I have asked three people already.",
    "My neighbour and I had an argument.",
    "I work full time.",
    "This may be a silly question.",
    "I live in a small town.",
)


class Ending(NamedTuple):
    """What a question says of the length of its answer, and how many sentences that is."""

    text: str
    shortest: int
    longest: int


ENDINGS = (
    Ending("One sentence is enough.", 1, 1),
    Ending("Please keep it short.", 1, 2),
    Ending("A few sentences will do.", 2, 4),
    Ending("Please tell me more than the basics.", 4, 6),
    Ending("I have time for a long answer.", 5, 6),
)
