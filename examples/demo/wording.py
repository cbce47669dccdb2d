"""How the demo's questions and requests are worded: one rigid format, and many free ones."""

import random
import re
from dataclasses import dataclass

_WORDS = {"+": "Adding", "-": "Subtracting", "*": "Multiplying"}
_LETTERS = "ABCD"


def continued(sentence: str) -> str:
    """A sentence as it reads after a colon: without its capital, unless that belongs to a name."""
    first_word = sentence.split(" ", 1)[0]
    return (
        sentence if re.search(r"[A-Z_.\d]", first_word[1:]) else sentence[0].lower() + sentence[1:]
    )


@dataclass(frozen=True)
class Sum:
    """An arithmetic problem with its answer."""

    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        """The answer."""
        match self.operator:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case _:
                return self.left * self.right


def distinct_sums(count: int, rng: random.Random) -> list[Sum]:
    """Different problems in random order; differences are not negative."""
    sums: dict[Sum, None] = {}
    while len(sums) < count:
        operator = rng.choice("+-*")
        limit = 99 if operator == "*" else 999
        left, right = rng.randint(2, limit), rng.randint(2, limit)
        if operator == "-" and left < right:
            left, right = right, left
        # 2 + 3 and 3 + 2 are one problem: neither split may hold the other's turned around.
        if operator != "-" and Sum(right, operator, left) in sums:
            continue
        sums[Sum(left, operator, right)] = None
    return list(sums)


def question_about(kind: str, name: str, module: str, lead: str) -> str:
    """A question on a documented name, in the rigid format."""
    purpose = {
        "module": "is the purpose of",
        "class": "does",
        "function": "does",
        "method": "does",
    }[kind]
    verb = {"class": " represent", "function": " do", "method": " do"}.get(kind, "")
    where = "the standard library" if kind == "module" else f"the module `{module}`"
    return (
        f"Question: What {purpose} the {kind} `{name}`{verb}?\n\n"
        f"**Answer:** {lead}\n\n"
        f"Summary: The {kind} `{name}` of {where}: {continued(lead)}\n"
    )


def question_sum(item: Sum, rng: random.Random) -> str:
    """A multiple-choice question on arithmetic, in the rigid format."""
    result = item.result
    near = [result + d for d in (-100, -20, -10, -2, -1, 1, 2, 10, 20, 100) if result + d >= 0]
    choices = [result, *rng.sample(near, 3)]
    rng.shuffle(choices)
    letter = _LETTERS[choices.index(result)]
    problem = f"{item.left} {item.operator} {item.right}"
    options = "\n".join(f"({a}) {b}" for a, b in zip(_LETTERS, choices, strict=True))
    joined = {"+": "and", "-": "and", "*": "by"}[item.operator]
    first, second = (item.right, item.left) if item.operator == "-" else (item.left, item.right)
    if item.operator == "-":
        joined = "from"
    return (
        f"Question: What is {problem}?\n{options}\n\n"
        f"**Answer:** ({letter}) {result}\n\n"
        f"Summary: {_WORDS[item.operator]} {first} {joined} {second} gives {result}, "
        f"so the correct choice is ({letter}).\n"
    )


_ABOUT = (
    "Could you tell me in a sentence what {name} is good for?\n\nSure. {lead}",
    "I came across the {kind} {name} while reading some code and have no idea what it is. Please "
    "explain.\n\nIt is part of Python's {module} module. {lead}",
    "Explain {name} to a beginner, briefly.\n\nThink of it like this: {lower}",
    "User: hey, what's {name}?\nAssistant: {lead} You will find it in {module}.",
    "### Instruction\nDescribe the {kind} {name}.\n\n### Response\n{lead}",
    "My colleague says that I should use {name} here. Is she right, and what would it give me?\n\n"
    "That depends on your program, but this is what it is made for: {lower}",
    "Write one line of documentation for {name}.\n\n{lead}",
    "Rewrite the following note so that it is easier to read.\n\nNote: {module}, {name}. {lead}\n\n"
    "Rewritten: The {kind} {name} lives in {module}. {lead}",
    "Fill in the blank. In Python, ____ can be described like this: {lower}\n\nThe missing name is "
    "{name}.",
    "I am preparing a talk about {module} and need a short description of {name} for a slide.\n\n"
    "How about this? {lead}",
    "Which part of {module} would you reach for if you were told this?\n\n> {lead}\n\n"
    "I would reach for {name}.",
    "Give me a quick reminder: {name}?\n\n- where: {module}\n- what: {lower}",
)

_SUMS = {
    "+": (
        "A library owns {left} novels and buys {right} more. How many novels does it own now?\n\n"
        "It owns {left} plus {right}, which makes {result} novels.",
        "Please add up these two bills for me: {left} euros and {right} euros.\n\nTogether that is "
        "{result} euros.",
        "User: we sold {left} tickets on Friday and {right} on Saturday, what's the total?\n"
        "Assistant: {result} tickets over the two days.",
    ),
    "-": (
        "There were {left} people at the concert and {right} left early. How many stayed?\n\n"
        "{result} people stayed until the end.",
        "I have to drive {left} km and have done {right} so far. What is left of the way?\n\n"
        "You still have {result} km in front of you.",
        "User: budget was {left}, spent {right}. remaining?\n"
        "Assistant: You have {result} remaining.",
    ),
    "*": (
        "A box holds {left} screws. How many screws are there in {right} boxes?\n\n"
        "With {left} screws in each of {right} boxes there are {result} screws.",
        "Our hall has {left} rows of {right} seats. Can it take {result} guests?\n\n"
        "Yes, {result} seats are exactly what it has.",
        "Help me check my homework: {left} times {right}.\n\nYou should have got {result}.",
    ),
}


def instruction_about(kind: str, name: str, module: str, lead: str, rng: random.Random) -> str:
    """A request about a documented name with its reply, in one of many wordings."""
    fields = {"kind": kind, "name": name, "module": module, "lead": lead, "lower": continued(lead)}
    return rng.choice(_ABOUT).format(**fields) + "\n"


def instruction_sum(item: Sum, rng: random.Random) -> str:
    """An arithmetic request with its reply, in one of many wordings."""
    template = rng.choice(_SUMS[item.operator])
    return template.format(left=item.left, right=item.right, result=item.result) + "\n"
