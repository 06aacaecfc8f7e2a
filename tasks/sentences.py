"""The sentences of the arithmetic task: pure data. Pairs are (in training, held out).

{a} and {b} are the numbers, {things} a plural. A verb phrase carries the mark that ends its sentence as its last character.
"""

VERB_PHRASES = (
    [
        "What is?", "What's?", "How much is?", "What does it give:?", "Which number is?",
        "Calculate.", "Compute.", "Work out.", "Please calculate.", "Please compute.", "Please work out.", "Find.", "Determine.",
        "Tell me.", "Give me.", "Show me.", "Solve:.", "Figure out.", "Do the sum:.",
        "Can you calculate?", "Can you tell me?", "Could you work out?", "Could you compute?", "Would you find?",
        "I need.", "I want to know.", "I would like to have.", "I am looking for.", "Let us work out.", "My question is:.",
        "What number is?", "What would be?", "What makes?", "How many is?", "What is the value of?", "What is the result of?", "What is the answer to?",
        "What comes out of?", "Which result has?", "What must I write for?",
        "Say.", "Name.", "Write down.", "Answer:.", "Quick:.", "Now.", "Try.", "Please find.", "Please solve:.", "Please tell me.", "Please give me.",
        "Please do.", "Do.", "Type.", "State.", "Report.", "Return.", "Check.", "Take.", "One more:.", "Next:.",
        "Let me know.", "Let me see.", "Let us find.", "Let us compute.", "Let's calculate.", "Let's see:.",
        "I must know.", "I would like to know.", "I have to compute.", "I am asking for.", "I am trying to find.", "I do not know.", "I forgot.",
        "I cannot work out.", "I was asked for.", "We need.", "We want.", "We are looking for.", "My teacher asks for.", "My homework is:.",
        "The task is:.", "The exercise says:.", "Here is a sum:.", "There is one thing that I need:.",
        "Can you find?", "Can you do?", "Can you work out?", "Can you solve?", "Can you give me?", "Could you calculate?", "Could you tell me?",
        "Could you find?", "Would you compute?", "Would you tell me?", "Will you work out?", "Will you give me?", "May I know?", "May I ask for?",
        "Are you able to compute?", "Is it hard to compute?", "Would you mind computing?",
    ],
    ["What do you get for?", "Do you happen to know?", "Evaluate.", "Help me with.", "Can somebody tell me?", "I wonder about."],
)  # fmt: skip

EXPRESSIONS = {
    "+": ["{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}", "{b} added to {a}", "{a} and {b} together"],
    "-": ["{a} - {b}", "{a}-{b}", "{a} minus {b}", "the difference between {a} and {b}", "{b} subtracted from {a}", "{a} less {b}"],
    "*": ["{a} * {b}", "{a}*{b}", "{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}", "{a} x {b}"],
}

ENDINGS = (
    [
        "", " please", ", please", " for me", " now", " right now", ", if you can", " exactly", ", thank you", " quickly", " as a number",
        " for my homework", " when you have time", " then", ", my friend", " for us", " again", " if possible", " at once", " precisely", " this time",
    ],
    [" today", " in numbers", " with the calculator"],
)  # fmt: skip

THINGS = [
    "apples", "books", "coins", "stamps", "pencils", "stones", "cards", "eggs", "boxes", "bottles", "chairs", "tickets", "shells",
    "buttons", "cups", "plates", "flowers", "candles", "balls", "keys", "nails", "bricks", "lamps", "seeds",
]  # fmt: skip

_COUNTED = (
    [
        "A shop has {a} {things}.", "There are {a} {things} in a room.", "A basket holds {a} {things}.", "I have {a} {things}.",
        "A school bought {a} {things}.", "We start with {a} {things}.", "A bag contains {a} {things}.", "My neighbour keeps {a} {things}.",
    ],
    ["A farmer owns {a} {things}.", "On a table lie {a} {things}."],
)  # fmt: skip
SETTINGS = {
    "+": _COUNTED,
    "-": _COUNTED,
    "*": (
        [
            "There are {a} {things} in each bag.", "Every shelf has {a} {things}.", "One crate contains {a} {things}.", "Each room has {a} {things}.",
            "A worker makes {a} {things} a day.", "A cart carries {a} {things}.", "One tray has space for {a} {things}.", "A machine packs {a} {things} per hour.",
        ],
        ["A box holds {a} {things}.", "Every child gets {a} {things}."],
    ),
}  # fmt: skip

EVENTS = {
    "+": (
        [
            "Then {b} more arrive.", "Later {b} more are added.", "Another {b} come in the evening.", "A friend adds {b} more.",
            "{b} more are bought.", "Then come {b} more.", "A visitor leaves another {b}.", "Soon {b} more are delivered.",
        ],
        ["Somebody brings {b} more.", "The next day {b} more are found."],
    ),
    "-": (
        [
            "Then {b} are sold.", "Later {b} of them are taken away.", "Somebody breaks {b} of them.", "Then {b} get lost.",
            "A friend borrows {b} of them.", "{b} of them are thrown out.", "A visitor takes {b} of them.", "Soon {b} are stolen.",
        ],
        ["{b} are given away.", "The next day {b} are gone."],
    ),
    "*": (
        [
            "There are {b} of these.", "We look at {b} of them.", "Now take {b} of that.", "It is the same {b} times.",
            "Count {b} of them together.", "Think of {b} such.", "Imagine {b} like it.", "Suppose that we have {b} of those.",
        ],
        ["Somebody orders {b} times as many.", "This happens {b} times."],
    ),
}  # fmt: skip

PROBLEM_QUESTIONS = {
    "+": ["How many {things} are there now?", "How many {things} is that altogether?", "What is the number of {things} now?", "How many {things} in all?"],
    "-": ["How many {things} are left?", "How many {things} remain?", "What number of {things} is left over?", "How many {things} are still there?"],
    "*": ["How many {things} is that in total?", "How many {things} does that make?", "What is the total number of {things}?", "How many {things} are that?"],
}
