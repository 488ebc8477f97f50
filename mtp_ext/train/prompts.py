"""What the trunk is asked while it writes the training text, and what it is tested on.

Half of the prompts are templates times topics; the other half the trunk writes itself, by being
given the chat template up to where the user speaks (`generate.py`), which covers what it was
tuned on. The held-out set shares neither a topic nor a template with the former.
"""

import random


def split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split(";"))


TOPICS = split(
    """
    photosynthesis; black holes; the French Revolution; compound interest; machine learning; the
    water cycle; volcanoes; democracy; supply and demand; the human heart; vaccines; climate
    change; quantum computing; the Roman Empire; jazz music; chess; sourdough bread; marathon
    training; meditation; time management; public speaking; electric cars; solar panels; wind
    energy; nuclear fission; DNA; evolution; the immune system; antibiotics; sleep; dreams;
    memory; stress; anxiety; friendship; leadership; teamwork; remote work; job interviews;
    resumes; budgeting; credit cards; mortgages; the stock market; inflation; taxes; small
    business; marketing; customer service; project management; negotiation; email etiquette;
    social media; online privacy; passwords; computer viruses; operating systems; databases;
    programming languages; Python lists; recursion; sorting algorithms; binary search; linked
    lists; hash tables; regular expressions; web browsers; HTTP; cloud computing; artificial
    intelligence; robots; self-driving cars; space travel; Mars; the Moon; the Solar System;
    comets; galaxies; gravity; light; sound; electricity; magnetism; atoms; the periodic table;
    acids and bases; chemical reactions; plastics; recycling; pollution; rainforests; coral reefs;
    whales; dolphins; sharks; penguins; elephants; lions; wolves; honeybees; butterflies; ants;
    spiders; snakes; dinosaurs; cats; dogs; horses; chickens; gardening; composting; tomatoes;
    houseplants; trees; mushrooms; coffee; tea; chocolate; cheese; wine; pizza; pasta; sushi;
    tacos; curry; salads; soup; breakfast; healthy eating; vitamins; protein; sugar; water;
    exercise; yoga; running; swimming; cycling; football; basketball; tennis; baseball; skiing;
    surfing; hiking; camping; fishing; sailing; photography; painting; drawing; sculpture;
    architecture; poetry; novels; Shakespeare; mythology; fairy tales; movies; theater; opera;
    guitar; piano; drums; singing; dancing; fashion; knitting; woodworking; home repair; cleaning;
    moving house; travel; airplanes; trains; bicycles; bridges; skyscrapers; Paris; London; New
    York City; Tokyo; Rome; Egypt; India; China; Brazil; Mexico; Australia; Canada; Africa;
    Antarctica; the Amazon River; the Pacific Ocean; Mount Everest; the Grand Canyon; deserts;
    islands; rivers; lakes; weather; hurricanes; tornadoes; earthquakes; tsunamis; snow; rainbows;
    the seasons; calendars; clocks; time zones; maps; languages; grammar; spelling; writing
    essays; reading; libraries; schools; homework; exams; college; scholarships; teachers;
    parenting; babies; teenagers; grandparents; weddings; birthdays; holidays; gifts; kindness;
    honesty; courage; patience; gratitude; happiness; love; forgiveness; justice; freedom; human
    rights; the United Nations; elections; the Constitution; laws; courts; police; firefighters;
    doctors; nurses; dentists; hospitals; first aid; allergies; the common cold; headaches; back
    pain; diabetes; blood pressure; the brain; the lungs; the skin; bones; muscles; eyes; hearing;
    fractions; percentages; prime numbers; triangles; circles; the Pythagorean theorem; algebra;
    probability; statistics; averages; graphs; calculus; logic; puzzles; riddles; philosophy;
    Socrates; ethics; religion; Buddhism; the Renaissance; World War II; the Cold War; the
    Industrial Revolution; the printing press; the telephone; the internet; radio; television;
    newspapers; video games; board games; toys; balloons; kites; lighthouses; castles; knights;
    pirates; dragons; ghosts; aliens; superheroes; detectives; treasure; magic; a lost puppy; an
    old house; a small village; a long journey; the future; a day at the beach; a rainy afternoon;
    a secret garden
"""
)

TEMPLATES = (
    "What is {t}?",
    "Tell me about {t}.",
    "Explain {t} in simple terms.",
    "Explain {t} to a five year old.",
    "Write a short story about {t}.",
    "Write a poem about {t}.",
    "Give me five tips about {t}.",
    "List ten facts about {t}.",
    "Why is {t} important?",
    "How does {t} work?",
    "What are the benefits of {t}?",
    "What are the main problems with {t}?",
    "Write an essay about {t}.",
    "Write a paragraph about {t}.",
    "Summarize the history of {t}.",
    "Give an introduction to {t} for beginners.",
    "What should I know about {t}?",
    "Can you help me understand {t}?",
    "What are some common misconceptions about {t}?",
    "Write a dialogue between two friends about {t}.",
    "Describe {t} in detail.",
    "Write a blog post about {t}.",
    "Write an email to my boss about {t}.",
    "Write a letter to a friend about {t}.",
    "Create a quiz with three questions about {t}.",
    "Give me a lesson plan about {t}.",
    "What are the most interesting things about {t}?",
    "Compare {t} with something similar.",
    "How can I learn more about {t}?",
    "Give me a step-by-step guide to {t}.",
    "What is the difference between {t} and {u}?",
    "How are {t} and {u} related?",
    "Write a speech about {t}.",
    "Write a song about {t}.",
    "Tell me a joke about {t}.",
    "Make a list of pros and cons of {t}.",
    "How has {t} changed over the years?",
    "What would the world be like without {t}?",
    "Write a product description related to {t}.",
    "Give three reasons to care about {t}.",
    "Write a news article about {t}.",
    "I am interested in {t}. Where do I start?",
    "What questions do people often ask about {t}?",
    "Define {t} and give an example.",
    "Write a conclusion for an essay about {t} and {u}.",
    "Write a story for children in which {t} plays a role.",
    "Suggest a title and an outline for an article about {t}.",
    "Explain the relationship between {t} and science.",
    "What is your opinion on {t}?",
    "hi, can you tell me something about {t}",
    "Write a Python function related to {t}.",
    "Write a Python program that prints information about {t}.",
    "Write a haiku about {t}.",
    "How do experts think about {t}?",
    "What are the key concepts of {t}?",
    "Give me advice about {t}.",
    "Rewrite this sentence to be more formal: {t} is really cool and I like it a lot.",
    "Translate to French: I like {t}.",
    "Write a tweet about {t}.",
    "Brainstorm ideas for a project about {t}.",
)

HELD_OUT_TOPICS = split(
    """
    lightning; the violin; penicillin; glaciers; the Silk Road; bread baking; owls; the telescope;
    saving money for retirement; the ocean tides; origami; Vikings; the stomach; neural networks;
    public libraries; a clockmaker; an astronaut stranded on an asteroid; bamboo; diplomacy; the
    metric system
"""
)

HELD_OUT_TEMPLATES = (
    "Could you walk me through {t}?",
    "Give me an overview of {t}, with examples.",
    "Write a fable that involves {t}.",
    "What surprises people most when they study {t}?",
    "Draft a short report on {t} for a museum visitor.",
    "How would you teach {t} to high school students?",
    "Name the essential facts regarding {t} and discuss each briefly.",
    "Imagine you are an expert on {t}. Answer a beginner's first question.",
)

HELD_OUT_QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Who was Marie Curie and what did she discover?",
    "How do I fix a flat bicycle tire?",
    "Write a thank-you note to a neighbor who watered my plants.",
    "If a train travels 60 miles in 1.5 hours, what is its average speed?",
    "What are the ingredients of a classic pancake recipe?",
    "Explain the difference between TCP and UDP.",
    "My friend is sad about losing a job. What should I say?",
    "Write a bash command that counts the lines in all text files of a folder.",
    "Plan a three-day trip to Lisbon.",
    "Write a function in JavaScript that reverses a string.",
    "Why is the sky blue?",
)


def templated_prompt(rng: random.Random) -> str:
    topic, other = rng.choice(TOPICS), rng.choice(TOPICS)
    return rng.choice(TEMPLATES).format(t=topic, u=other)


def held_out_prompts() -> list[str]:
    """72 questions: the fixed ones, and every held-out topic in three held-out templates."""
    templated = [
        HELD_OUT_TEMPLATES[(i + 3 * j) % len(HELD_OUT_TEMPLATES)].format(t=topic)
        for i, topic in enumerate(HELD_OUT_TOPICS)
        for j in range(3)
    ]
    return [*HELD_OUT_QUESTIONS, *templated]
