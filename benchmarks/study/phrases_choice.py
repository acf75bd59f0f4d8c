"""How people ask which of two things to choose, and the sentences that help them."""

from __future__ import annotations

from fastpref.benchmarks.study.phrases import Group, Kind, Shape

CHOICE = Shape(
    kinds=(
        Kind(
            forms=(
                "Which is better, {a} or {b}?",
                "What is the difference between {a} and {b}?",
                "Compare {a} and {b}.",
                "How do {a} and {b} differ?",
                "What speaks for {a}, and what for {b}?",
                "Which is better, {b} or {a}?",
            ),
            openings=("neither is wrong.", "both have their place.", "it is a close call.", "people disagree on this."),
            must="sides",
        ),
        Kind(
            forms=(
                "Should I choose {a} or {b}?",
                "When should I choose {a} over {b}?",
                "When should I choose {b} over {a}?",
                "Would you choose {a} or {b}?",
                "Help me to choose between {a} and {b}.",
                "I cannot choose between {a} and {b}. What do you say?",
            ),
            openings=("that depends.", "you cannot go far wrong.", "there is no single right answer."),
            must="pick",
        ),
        Kind(
            forms=(
                "What matters most in the choice between {a} and {b}?",
                "How do people decide between {a} and {b}?",
                "What should I ask myself before I choose between {a} and {b}?",
            ),
            openings=("one question is enough.", "be honest with yourself.", "think before you decide."),
            must="factor",
        ),
        Kind(
            forms=(
                "Is it a mistake to choose {a} over {b}?",
                "Is it a mistake to choose {b} over {a}?",
            ),
            openings=(
                "no, not at all",
                "it is not a mistake if you know why you do it",
                "no, many people are happy with that choice",
            ),
            must="opening",
        ),
    ),
    groups=(
        Group(
            "factor",
            "statement",
            (
                "it depends on {factor}",
                "the main thing to think about is {factor}",
                "what matters most is {factor}",
                "most people would do well to begin with {factor}",
                "the answer changes with {factor}",
            ),
        ),
        Group(
            "sides",
            "statement",
            (
                "{pro_a}, while {pro_b}",
                "{pro_a}, but {pro_b}",
                "{pro_b}, whereas {pro_a}",
                "it is true that {pro_a}, and yet {pro_b}",
                "on the one hand, {pro_a}; on the other hand, {pro_b}",
                "people say that {pro_a} and that {pro_b}, and both are right",
            ),
        ),
        Group(
            "pick",
            "either",
            (
                "choose {a} if {when_a}, and {b} if {when_b}",
                "if {when_a}, choose {a}; if {when_b}, choose {b}",
                "go for {b} if {when_b}, and otherwise for {a}",
                "I would choose {a} if {when_a} and {b} in all other cases",
                "if {when_b}, then {b} would be my choice",
                "if {when_a}, then {a} would be my choice",
            ),
        ),
        Group(
            "aside",
            "command",
            (
                "try both for a week if you can",
                "ask a friend who has tried both",
                "write down what you want before you spend any money",
                "do not let anyone rush you",
                "talk it over with the people who share your home",
            ),
        ),
        Group(
            "comfort",
            "either",
            (
                "you can change your mind later",
                "a wrong choice here costs little",
                "the difference is smaller than most people think",
                "either way, you will learn something",
                "whatever you choose, give it some time",
            ),
        ),
    ),
    prefaces=(
        "We cannot agree on this at home.",
        "I have to decide by Friday.",
        "I have changed my mind twice.",
        "I do not want to waste money.",
        "My parents and I disagree.",
        "I only have room for one of them.",
    ),
    closings=("I hope that helps.", "good luck with your choice!", "take your time.", "trust yourself."),
)
