"""Write a small, fully synthetic data set in the format of the SST, Quora and STS files.

Every sentence comes from the grammar below, and every label follows from how its sentence was built. So the files are
free to copy. A demo trains on them in minutes. The same seed gives the same bytes.

    python data/make_sample.py [--out DIR] [--seed N]
"""

import argparse
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Slots = dict[str, list[str]]


def read_families(text: str) -> dict[str, list[list[str]]]:
    """Read `name: entry; entry` lines. Return the lists of entries by name, one list for each line."""
    table: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        names, _, entries = line.strip().partition(":")
        for name in filter(None, names.split(", ")):
            table.setdefault(name, []).append([entry.strip() for entry in entries.split(";")])
    return table


def read_grammar(text: str) -> Slots:
    """Read `name: entry; entry` lines. Return all entries by name."""
    return {name: [entry for line in table for entry in line] for name, table in read_families(text).items()}


# In the lists below a line is `name: entry; entry; ...`. A repeated name adds entries. `a, b:` gives both names the
# same entries. {name} stands for any entry of that name.

# --- SST: film reviews ------------------------------------------------------------------------------------------------
# Adjectives and verbs have a strength from -2 (label 0) to +2 (label 4). The frame around them shifts it.

REVIEW = read_grammar("""
    adj +2: superb; dazzling; magnificent; exquisite; unforgettable; masterful; sublime; breathtaking; glorious
    adj +1: pleasant; charming; likable; engaging; amusing; tender; clever; graceful; inventive; lively
    adj -1: clumsy; stale; tedious; muddled; predictable; sluggish; bland; shallow; forgettable; awkward
    adj -2: dreadful; insufferable; atrocious; wretched; unbearable; appalling; abysmal; excruciating; disastrous
    verb +2: soars; astonishes; enchants; sweeps you away
    verb +1: entertains; works; amuses; pays off
    verb -1: drags; stumbles; disappoints; wears thin
    verb -2: falls to pieces; exasperates; repels; fails miserably

    clause plain: {aspect} is {adj}; {aspect} feels {adj}; {aspect} remains {adj}; {aspect} {verb}
    clause boost: {aspect} is utterly {adj}; {aspect} feels thoroughly {adj}; {aspect} is remarkably {adj}
    clause damp: {aspect} is a little {adj}; {aspect} seems rather {adj}; {aspect} is somewhat {adj}
    clause negate: {aspect} is not {adj}; {aspect} is hardly {adj}; {aspect} is far from {adj}
    clause negate: {aspect} never feels {adj}; {aspect} does not seem {adj}
    clause negate: {aspect} never {verb}; {aspect} rarely {verb}; {aspect} hardly {verb}
    verdict plain: {director} delivers a {adj} {genre}; this is a {adj} {genre} {topic}; we get a {adj} {genre}
    verdict boost: {director} delivers a thoroughly {adj} {genre}; this is a remarkably {adj} {genre} {topic}
    verdict damp: {director} delivers a rather {adj} {genre}; this is a somewhat {adj} {genre} {topic}
    verdict negate: {director} hardly delivers a {adj} {genre}; this is not a {adj} {genre} {topic}

    single: {one}; {fact} , and {one}; {one} , and {fact}; through all {number} minutes , {one}; all in all , {one}
    agree: {one} and {two}; {one} , and {two} as well; {one} -- and {two}; to begin with , {one} , and {two}
    contrast: {one} , but {two}; although {one} , {two}; {one} , yet {two}; granted , {one} , but {two}
    contrast: {two} , even though {one}; {two} , although {one}; while {one} , {two}; {one} -- still , {two}
    neutral: {aspect} is neither {adj +2} nor {adj -2}; {film} is as {adj +2} as it is {adj -2}; {plot} , and {making}
    neutral: {aspect} is {adj +2} in one half and {adj -2} in the other; {plot}; {making}
    neutral: some will call {film} {adj +1} and others {adj -1}; {plot} , and {aspect} is by {director}

    aspect: the screenplay; the dialogue; the score; the camerawork; the lead performance; the ending; the pacing
    aspect: the direction; the editing; the supporting cast; the production design; the humor; the opening act
    film: the film; the picture; the movie; this {genre}
    genre: comedy; drama; thriller; western; documentary; romance; musical; mystery; fable; war story
    director: Mara Lindqvist; Otto Brandel; Inez Carrow; Tomas Vael; Priya Sandoval; Hugh Ferriday
    topic: about {people}; about {people} in {setting}; set in {setting}
    people: two beekeepers; a retired pilot; three sisters; a lighthouse keeper; a village choir; rival chess players
    people: a young locksmith; an orphaned painter; a taxi driver and his son; four stranded tourists; a gentle thief
    setting: a fishing village; postwar Lisbon; a mountain hotel; an empty airport; the far north; a mining town
    setting: a small harbor; a boarding school; a railway station; the suburbs of Oslo; a traveling circus
    number: eighty; ninety; one hundred; seventy; eighty-five; ninety-five
    fact: {plot}; {making}
    plot: {film} follows {people} in {setting}; {film} is set in {setting}; {film} opens in {setting}
    plot: the story takes {people} to {setting}; {director} adapts a novel about {people}
    making: {film} runs for {number} minutes; {film} was shot in {number} days; {director} wrote it for the stage first
""")

# --- Quora: questions -------------------------------------------------------------------------------------------------
# Each paragraph is a question, and "ask" has its wordings. "|" separates two ways to say the same. Another entry makes
# another question.

QUESTION_TEXT = """
    ask: How do I learn to {skill} {limit}?; What is the best way to teach myself to {skill} {limit}?
    ask: I would love to {skill} {limit}. Where should I start?; What should a beginner do to {skill} {limit}?
    skill: bake bread|make homemade bread; play the cello; speak Finnish|hold a conversation in Finnish; knit socks
    skill: draw portraits|sketch faces; write computer programs|code; repair bicycles|fix bikes; read music; swim
    skill: grow tomatoes|raise tomato plants; dance the tango; type fast|type at high speed; do magic tricks
    limit: without a teacher|without taking lessons; in a month|within four weeks; after fifty|past the age of fifty
    limit: at home|without leaving the house; on a small budget|without spending much; with friends

    ask: What is the {best} way to get from {a} to {b}?; How do I travel to {b} from {a} by the {best} route?
    ask: I am in {a}. What is the {best} option for reaching {b}?
    ask: Which trip to {b} is the {best} if I set out from {a}?
    best: cheapest|least expensive; fastest|quickest; safest|least risky; prettiest|most scenic
    a, b: Porto; Vienna; Oslo; Naples; Krakow; Bruges; Seville; Tallinn; Zagreb; Lyon; Bergen; Turin

    ask: Why do {animal} {habit}?; What makes {animal} {habit}?; What is the reason that {animal} {habit}?
    ask: How do scientists explain that {animal} {habit}?
    animal: cats|house cats; crows; rabbits|bunnies; horses; parrots; dogs; mice; donkeys; foxes; goats; hens|chickens
    habit: avoid water|stay away from water; seek water|look for water; sleep by day|rest during daylight
    habit: sleep at night|rest after dark; trust people|feel safe near humans; fear people|feel afraid of humans
    habit: live in groups|stay together; live alone|stay on their own; remember faces|recognize faces
    habit: forget faces|fail to recognize faces

    ask: How do I get {stain} out of {cloth}?; What removes {stain} from {cloth}?
    ask: There is {stain} on {cloth}. How do I clean it?; Is there a simple trick against {stain} on {cloth}?
    stain: red wine|a red wine stain; coffee|a coffee stain; ink|an ink stain; candle wax|wax; chewing gum|gum; paint
    cloth: a wool carpet|a woolen rug; a cotton shirt; leather shoes; a linen tablecloth; a silk scarf
    cloth: a denim jacket|a jean jacket; a velvet sofa|a velvet couch

    ask: How do I turn {a} into {b}?; What is the simplest way to convert {a} to {b}?
    ask: I have {a} but I need {b}. How do I change it?; Which program makes {b} out of {a}?
    a, b: a spreadsheet|an Excel sheet; a PDF|a PDF file; a slide show|a presentation; a photo|a picture
    a, b: a web page|an HTML page; a text file|a plain text document; a voice memo|an audio recording
    a, b: a video|a movie file

    ask: {quantity} do I need to {project}?; I am about to {project}. {quantity} should I plan for?
    ask: I want to {project}. {quantity} will it take?; {quantity} is it going to take to {project}?
    quantity: How much money|How much cash; How much time|How many hours; How many people|How many helpers
    quantity: How much space|How much room
    project: build a garden shed|put up a shed; open a cafe|start a coffee shop; plan a wedding|organize a wedding
    project: redo a bathroom|renovate a bathroom; plant an orchard; restore a sailboat|repair an old sailboat
    project: print a novel|publish a novel; hold a street fair|run a street fair; move house|move to a new home

    ask: Can I {act} {condition}?; Is it possible to {act} {condition}?
    ask: I need to {act} {condition}. Will that work?; Would anyone let me {act} {condition}?
    act: rent an apartment|lease a flat; open a bank account; ship a parcel abroad|send a package overseas
    act: adopt a dog|take in a dog; drive a truck; found a company|start a business; get married|marry
    act: change my name|take another name; keep chickens|raise chickens
    condition: without a passport|if I have no passport; with just a passport|if I only have a passport
    condition: without a job|while unemployed; with a job|while employed; before turning eighteen|as a minor
    condition: after turning eighteen|as an adult; on a valid visa|before my visa ends
    condition: on an expired visa|after my visa ends

    ask: Which {thing} in {city} {is} the {extreme}?; What {is} the {extreme} {thing} in {city}?
    ask: I am writing about {city}. Which {thing} there {is} the {extreme}?
    ask: Of every {thing} in {city}, which one {is} the {extreme}?
    thing: museum; market|marketplace; park|public garden; theater|playhouse; bridge; bakery|bread shop
    is: is|is currently; was|used to be; will be|is going to be
    extreme: largest|biggest; smallest|tiniest; most popular|best loved; least popular|least loved
    city: Dublin; Prague; Genoa; Riga; Toulouse; Valencia; Graz; Gdansk; Malmo; Leipzig; Athens; Cork
"""
QUESTIONS = [read_grammar(paragraph) for paragraph in QUESTION_TEXT.split("\n\n")]
SAME_WORDING = {True: 0.25, False: 0.5}  # how often a duplicate (True) or another question repeats the wording
UNRELATED_QUESTIONS = 0.2  # share of the negative pairs whose questions have nothing in common

# --- STS: events ------------------------------------------------------------------------------------------------------
# Each line is a family of related concepts. "|" separates synonyms. The verbs of a family take the objects of the same
# family. "/" separates a verb's present and past participle.

EVENTS = read_families("""
    agent: man|guy; woman|lady; old man|elderly man
    agent: boy|young boy; girl|young girl; toddler|small child
    agent: chef|cook; waiter|server; baker
    agent: soldier|trooper; police officer|policeman; guard|watchman
    agent: teacher|instructor; student|pupil
    verb: slicing/sliced|cutting up/cut up; peeling/peeled; washing/washed|rinsing/rinsed
    object: turnip; radish; beet|beetroot; gherkin
    verb: repairing/repaired|fixing/fixed; painting/painted; cleaning/cleaned|wiping/wiped
    object: bicycle|bike; canoe|small boat; tractor; wheelbarrow|pushcart
    verb: playing/played; tuning/tuned; selling/sold
    object: harmonica|mouth organ; banjo; clarinet; accordion|squeezebox
    verb: feeding/fed; stroking/stroked|petting/petted; chasing/chased|pursuing/pursued
    object: goat; lamb|young sheep; donkey|burro; goose
    verb: reading/read; writing/written|composing/composed; tearing up/torn up|shredding/shredded
    object: postcard; poem; report|essay; note|message
    verb: throwing/thrown|tossing/tossed; catching/caught; kicking/kicked
    object: snowball; pebble|small stone; coconut; frisbee|flying disc
    place: in the garden|in the yard; in the park; on the lawn|on the grass
    place: near the river|by the river; at the lake; on the beach|on the shore
    place: in the kitchen; in the hallway|in the corridor; in the basement|in the cellar
    place: on the street|on the road; at the market; in the town square|in the plaza
    manner: slowly|without haste; carefully|with care
    manner: quickly|in a hurry; eagerly|with enthusiasm
    manner: late at night|in the middle of the night; at dusk|in the evening
""")
PRESENT = {"place": 0.7, "manner": 0.5}  # how often an event has these slots. It always has the others
WEIGHTS = {"agent": 3, "verb": 3, "object": 3, "place": 2, "manner": 1}
SYNONYM, RELATED = 0.95, 0.5  # share of a slot's weight that a pair of such words keeps
SENTENCES = read_grammar("""
    active: a {agent} is {verb} a {object} {place} {manner}.; there is a {agent} {verb} a {object} {place} {manner}.
    active: {manner} a {agent} is {verb} a {object} {place}.
    passive: a {object} is being {verb} by a {agent} {place} {manner}.
    passive: {place} a {object} is being {verb} by a {agent} {manner}.
""")

# --- Examples ---------------------------------------------------------------------------------------------------------


Example = tuple[tuple[str, ...], str]  # a sentence or a pair, and the label as printed in the file


class Choice(NamedTuple):
    """The word of a slot."""

    family: int
    concept: int
    word: str


Event = dict[str, Choice]


def expand(rng: random.Random, text: str, slots: Slots) -> str:
    """Replace each {name} by a random entry of `slots[name]`, until none is left."""
    while "{" in text:
        text = re.sub(r"{([^}]+)}", lambda match: rng.choice(slots[match[1]]), text)
    return text


def tidy(text: str) -> str:
    """Remove surplus spaces, turn "a" before a vowel into "an", and capitalise the first letter."""
    text = re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", " ".join(text.split()))
    return text[0].upper() + text[1:]


def make_opinion(rng: random.Random, scene: Slots, kind: str) -> tuple[str, int]:
    """Return a clause and its strength. Negation gives the weak opposite: "not superb" is only mildly bad."""
    frame = rng.choice(["plain", "boost", "damp", "negate"])
    strength = rng.choice([-1, 1] if frame == "damp" else [-2, -1, 1, 2])
    words = {"adj": scene[f"adj {strength:+d}"], "verb": scene[f"verb {strength:+d}"]}
    sign = 1 if strength > 0 else -1
    shifted = {"plain": strength, "boost": 2 * sign, "damp": sign, "negate": -sign}[frame]
    return expand(rng, rng.choice(scene[f"{kind} {frame}"]), scene | words), shifted


def make_review(rng: random.Random) -> Example:
    """Return a film review. Of two opposed opinions the one in {two} decides, weaker by a step if {one} is strong."""
    scene = REVIEW | {name: [rng.choice(REVIEW[name])] for name in ("genre", "director", "people", "setting", "number")}
    aspects = rng.sample(REVIEW["aspect"], 2)
    one, a = make_opinion(rng, scene | {"aspect": aspects[:1]}, rng.choice(["clause", "clause", "verdict"]))
    two, b = make_opinion(rng, scene | {"aspect": aspects[1:]}, "clause")
    both = "agree" if a * b > 0 else "contrast"
    kind = rng.choice(["neutral", "single", both, both])
    decided = max(1, abs(b) - abs(a) + 1) * (1 if b > 0 else -1)
    strength = {"neutral": 0, "single": a, "agree": max(a, b, key=abs), "contrast": decided}[kind]
    scene |= {"one": [one], "two": [two]}
    return (f" {tidy(expand(rng, rng.choice(REVIEW[kind]), scene))} .",), str(strength + 2)


def make_meaning(rng: random.Random, question: Slots) -> dict[str, str]:
    """Choose an entry for each slot of a question. All entries are different."""
    meaning = {slot: rng.choice(entries) for slot, entries in question.items() if slot != "ask"}
    return meaning if len(set(meaning.values())) == len(meaning) else make_meaning(rng, question)


def near_miss(rng: random.Random, question: Slots, meaning: dict[str, str]) -> dict[str, str]:
    """Return a meaning that swaps {a} and {b} or differs in one slot."""
    if "a" in meaning and rng.random() < 0.5:
        return {**meaning, "a": meaning["b"], "b": meaning["a"]}
    slot = rng.choice(list(meaning))
    return {**meaning, slot: rng.choice([entry for entry in question[slot] if entry not in meaning.values()])}


def ask(rng: random.Random, wording: str, meaning: dict[str, str]) -> str:
    """Put a meaning into words. Choose any of the alternatives that "|" separates."""
    return tidy(expand(rng, wording, {slot: entry.split("|") for slot, entry in meaning.items()}))


def make_question_pair(rng: random.Random) -> Example:
    """Return two questions and whether they ask the same thing."""
    question, other = rng.sample(QUESTIONS, 2)
    duplicate = rng.random() < 0.5
    meaning = make_meaning(rng, question)
    first, second = rng.sample(question["ask"], 2)
    if not duplicate and rng.random() < UNRELATED_QUESTIONS:
        second, other_meaning = rng.choice(other["ask"]), make_meaning(rng, other)
    else:
        second = first if rng.random() < SAME_WORDING[duplicate] else second
        other_meaning = meaning if duplicate else near_miss(rng, question, meaning)
    return (ask(rng, first, meaning), ask(rng, second, other_meaning)), str(float(duplicate))


def make_event(rng: random.Random, like: Event, change: float) -> Event:
    """Draw an event. Each choice is the same as in the event `like` with probability 1 - `change`."""

    def keep() -> bool:
        return rng.random() >= change

    event: Event = {}
    for slot, lines in EVENTS.items():
        old = like.get(slot)
        if not (old if keep() else rng.random() < PRESENT.get(slot, 1)):
            continue
        family = old.family if old and keep() else rng.randrange(len(lines))
        if slot == "object":
            family = event["verb"].family
        concept = old.concept if old and old.family == family and keep() else rng.randrange(len(lines[family]))
        event[slot] = Choice(family, concept, rng.choice(lines[family][concept].split("|")))
    return event


def common_share(a: Choice, b: Choice) -> float:
    """Return how much two words of a slot have in common, 0 to 1."""
    if a == b:
        return 1
    if (a.family, a.concept) == (b.family, b.concept):
        return SYNONYM
    return RELATED if a.family == b.family else 0


def similarity(one: Event, two: Event) -> float:
    """Return the weighted share that two events have in common, from 0 to 5 in steps of 0.2."""
    kept = total = 0.0
    for slot, weight in WEIGHTS.items():
        a, b = one.get(slot), two.get(slot)
        if a and b:
            total += weight
            kept += weight * common_share(a, b)
        elif a or b:  # a missing detail costs half as much as a different one
            total += weight / 2
    return round(25 * kept / total) / 5


def describe(rng: random.Random, event: Event) -> str:
    """Describe an event in an active or passive sentence."""
    voice = rng.choice(["active", "active", "passive"])
    slots = {slot: [event[slot].word if slot in event else ""] for slot in EVENTS}
    slots["verb"] = [event["verb"].word.split("/")[voice == "passive"]]
    return tidy(expand(rng, rng.choice(SENTENCES[voice]), slots)).replace(" .", ".")


def make_event_pair(rng: random.Random) -> Example:
    """Return two described events and their similarity."""
    one = make_event(rng, {}, change=1)
    two = make_event(rng, one, change=rng.random() ** 2)
    return (describe(rng, one), describe(rng, two)), str(similarity(one, two))


# --- The files --------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """How the examples of a task are made, and the columns and label shares of its files."""

    make: Callable[[random.Random], Example]
    columns: list[str]  # the texts, then the label
    shares: list[float]  # of the examples with the labels 0, 1 and so on, rounded down


TASKS = {
    "ids-sst": Task(make_review, ["sentence", "sentiment"], [0.18, 0.22, 0.2, 0.22, 0.18]),
    "quora": Task(make_question_pair, ["sentence1", "sentence2", "is_duplicate"], [0.6, 0.4]),
    "sts": Task(make_event_pair, ["sentence1", "sentence2", "similarity"], [0.2, 0.2, 0.2, 0.2, 0.2]),
}
SPLITS = {"train": 600, "dev": 150, "test-student": 150}


def draw(rng: random.Random, task: Task, count: int, seen: set[frozenset[str]]) -> list[Example]:
    """Make `count` examples in the task's shares. None is in `seen`, and all are added to it."""
    quotas = [round(share * count) for share in task.shares]
    examples = []
    while any(quotas):
        texts, label = task.make(rng)
        group = min(int(float(label)), len(quotas) - 1)
        if quotas[group] and frozenset(texts) not in seen and len(set(texts)) == len(texts):
            quotas[group] -= 1
            seen.add(frozenset(texts))
            examples.append((texts, label))
    rng.shuffle(examples)
    return examples


def to_rows(name: str, split: str, examples: Sequence[Example], numbers: Sequence[int]) -> list[list[str]]:
    """Return the rows of a file of the course. Test files have no label, and SST's has an odd second index."""
    columns = TASKS[name].columns
    is_test = split == "test-student"
    rows = [["", "id", *(columns[:-1] if is_test else columns)]]
    for (texts, label), number in zip(examples, numbers, strict=True):
        identifier = hashlib.sha256("\t".join([name, *texts]).encode()).hexdigest()[:25]
        rows.append([str(number), identifier, *texts, *([] if is_test else [label])])
    if is_test and name == "ids-sst":
        firsts = [["0", ""], *([str(i + 1), str(float(i))] for i in range(len(examples)))]
        rows = [first + row[1:] for first, row in zip(firsts, rows, strict=True)]
    return rows


def write_sample(folder: Path, seed: int) -> None:
    """Write the nine files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        rng = random.Random(f"{name} {seed}")
        seen: set[frozenset[str]] = set()
        numbers = rng.sample(range(sum(SPLITS.values())), sum(SPLITS.values()))
        for split, count in SPLITS.items():
            rows = to_rows(name, split, draw(rng, task, count, seen), [numbers.pop() for _ in range(count)])
            text = "".join("\t".join(row) + "\n" for row in rows)
            (folder / f"{name}-{split}.csv").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write the synthetic sample data set.")
    folder = "folder for its nine files (default: sample, beside this script)"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample", metavar="DIR", help=folder)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw (default: %(default)s)")
    args = parser.parse_args()
    try:
        write_sample(args.out, args.seed)
    except OSError as error:
        parser.exit(2, f"error: --out {args.out}: cannot be written ({error}); choose another folder\n")


if __name__ == "__main__":
    main()
