"""How people ask for an explanation, and the sentences that give it."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Group, Kind, Shape

WHY = Shape(
    kinds=(
        Kind(
            forms=(
                "{question}",
                "Can you explain {clause}?",
                "Explain {clause}.",
                "Do you know {clause}?",
                "I have always wondered {clause}.",
                "Tell me {clause}.",
                "Explain to a child {clause}.",
                "Who can tell me {clause}?",
                "What do experts say about {about}?",
            ),
            openings=(
                "good question.",
                "the answer surprises many people.",
                "this is simpler than it sounds.",
                "many people ask this.",
                "there is a short answer and a long one.",
            ),
            must="cause",
        ),
        Kind(
            forms=(
                "Is it true that {myth}?",
                "I read that {myth}. Is that right?",
                "Someone told me that {myth}. Should I believe it?",
                "Do you agree that {myth}?",
            ),
            openings=("no.", "not really.", "that is an old mistake.", "you should not believe everything."),
            must="myth",
        ),
        Kind(
            forms=(
                "How can I find out for myself {clause}?",
                "How can I help a child understand {clause}?",
                "What would help me to understand {clause}?",
            ),
            openings=("a small example helps.", "it is best to see it for yourself.", "you can do this in an hour."),
            must="test",
        ),
        Kind(
            forms=(
                "Tell me something interesting about {about}.",
                "What else should I know about {about}?",
                "Give me one fact about {about}.",
                "What do few people know about {about}?",
            ),
            openings=("here is one thing that I like.", "there is plenty to tell.", "gladly."),
            must="detail",
        ),
    ),
    groups=(
        Group(
            "cause",
            "statement",
            (
                "{cause}",
                "the short answer is that {cause}",
                "put simply, {cause}",
                "as far as we know, {cause}",
                "it comes down to this: {cause}",
                "most experts agree that {cause}",
                "we now know that {cause}",
            ),
        ),
        Group(
            "detail",
            "statement",
            (
                "{detail}",
                "few people know that {detail}",
                "it is also true that {detail}",
                "you may like to know that {detail}",
                "it is good to remember that {detail}",
                "what I find most interesting is that {detail}",
            ),
        ),
        Group(
            "myth",
            "statement",
            (
                "it is not true that {myth}",
                "many people say that {myth}, but that is wrong",
                "the old idea that {myth} is a mistake",
                "nobody has ever shown that {myth}",
                "you will hear that {myth}, yet the facts say otherwise",
                "there is no good reason to believe that {myth}",
            ),
        ),
        Group(
            "test",
            "either",
            (
                "to see it for yourself, {test}",
                "if you are curious, {test}",
                "{test}, and the idea becomes clear",
                "here is something to try: {test}",
                "on a free afternoon, {test}",
                "{test}, and think about what you find",
            ),
        ),
        Group(
            "aside",
            "statement",
            (
                "there is more to say about {about} than fits in one answer",
                "people still write whole books about {about}",
                "children often ask the best questions about {about}",
                "it took a long time to learn even that much about {about}",
                "new facts about {about} turn up every year",
            ),
        ),
    ),
    prefaces=(
        "My son asked me this at breakfast.",
        "We talked about this at dinner.",
        "This came up in a quiz.",
        "I have to give a short talk.",
        "I forgot what we learned about it at school.",
        "I like to know how things work.",
    ),
    closings=(
        "I hope that helps.",
        "keep asking!",
        "it is worth reading more about this.",
        "the world is full of surprises.",
    ),
)
