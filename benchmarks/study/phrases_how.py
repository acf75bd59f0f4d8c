"""How people ask how something is done, and the sentences that answer them."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Group, Kind, Shape

HOW = Shape(
    kinds=(
        Kind(
            forms=(
                "How do I {do}?",
                "What is the best way to {do}?",
                "How can I {do} if I have never done it before?",
                "Show me how to {do}.",
                "Teach me to {do}.",
                "I would like to {do}. Where do I start?",
                "What is the first step if I want to {do}?",
                "Give me some tips for {doing}.",
                "Help me to {do}.",
                "How does one {do}?",
                "What would you tell a beginner about {doing}?",
            ),
            openings=(
                "it is easier than it looks.",
                "take it one step at a time.",
                "here is what works for most people.",
                "a little care goes a long way.",
                "anyone can learn this.",
            ),
            must="first",
        ),
        Kind(
            forms=(
                "What do I need to {do}?",
                "What should I have ready before {doing}?",
                "Do I need anything special for {doing}?",
                "Tell me what I need for {doing}.",
            ),
            openings=("less than you might think.", "not much.", "you may have most of it already."),
            must="tool",
        ),
        Kind(
            forms=(
                "What should I avoid when {doing}?",
                "What do people get wrong when {doing}?",
                "What is the most common mistake in {doing}?",
                "Name a mistake that beginners make when {doing}.",
                "I tried to {do} and it went wrong. Why?",
            ),
            openings=(
                "everyone gets this wrong at first.",
                "most mistakes come from haste.",
                "do not feel bad about it.",
            ),
            must="avoid",
        ),
        Kind(
            forms=(
                "How long does it take to {do}?",
                "How much time should I plan for {doing}?",
                "Does it take long to {do}?",
            ),
            openings=("it depends a little on you.", "it takes some patience.", "time is not the problem."),
            must="time",
        ),
        Kind(
            forms=(
                "How will I know that I am {doing} the right way?",
                "What is a good sign when {doing}?",
                "How do I check my work when {doing}?",
            ),
            openings=("there is a simple test.", "look closely.", "you will soon get a feeling for it."),
            must="sign",
        ),
        Kind(
            forms=("Should I learn to {do}?", "Is it worth learning to {do}?", "Is {doing} worth the trouble?"),
            openings=(
                "yes, it is worth the effort",
                "yes, you will be glad that you did",
                "I think so, because few things give so much for so little work",
                "it is, if you enjoy learning new things",
            ),
            must="opening",
        ),
        Kind(
            forms=("Is {doing} hard?", "How difficult is it to {do}?", "Can anyone learn to {do}?"),
            openings=(
                "it is not as hard as people think",
                "it needs more patience than talent",
                "most people manage it at the second attempt",
                "with some practice, anyone can do it",
            ),
            must="opening",
        ),
    ),
    groups=(
        Group(
            "tool",
            "statement",
            (
                "you need {tool}",
                "all it takes is {tool}",
                "it is much easier with {tool}",
                "the only thing that you cannot do without is {tool}",
                "most people are happy with {tool}",
                "you will want {tool}",
            ),
        ),
        Group(
            "first",
            "command",
            (
                "first, {first}",
                "{first}, and only then go on",
                "to start, {first}",
                "the first step is simple: {first}",
                "{first}, then {then}",
                "{first}, and after that {then}",
                "begin like this: {first}",
                "in short, {first} and {then}",
            ),
        ),
        Group(
            "then",
            "command",
            (
                "then {then}",
                "after that, {then}",
                "next, {then}",
                "once that is done, {then}",
                "when you are ready, {then}",
            ),
        ),
        Group(
            "why",
            "statement",
            (
                "remember that {why}",
                "it helps to know that {why}",
                "experience shows that {why}",
                "{why}",
                "as a rule, {why}",
                "the thing to keep in mind is that {why}",
            ),
        ),
        Group(
            "avoid",
            "either",
            (
                "avoid {avoid}",
                "the usual mistake is {avoid}",
                "many people spoil it by {avoid}",
                "{avoid} is what goes wrong most often",
                "be careful about one thing: {avoid} will cost you dearly",
                "the one thing to leave out is {avoid}",
            ),
        ),
        Group(
            "sign",
            "statement",
            (
                "you know that it worked when {sign}",
                "all is well when {sign}",
                "a good sign is that {sign}",
                "you can be proud of yourself once {sign}",
                "what you want to see is that {sign}",
                "things have gone well if {sign}",
            ),
        ),
        Group(
            "time",
            "statement",
            (
                "it takes {time}",
                "you should allow {time} for it",
                "for most people, it is a matter of {time}",
                "plan on {time}",
                "expect to spend {time} on it",
                "a beginner needs {time}",
            ),
        ),
    ),
    prefaces=(
        "I am a beginner.",
        "I tried this once and gave up.",
        "I have some free time.",
        "I never learned this at home.",
        "I want to do this properly.",
        "I am doing this alone.",
    ),
    closings=(
        "good luck!",
        "you can do it!",
        "take your time.",
        "let me know how it goes.",
        "the rest comes with practice.",
    ),
)
