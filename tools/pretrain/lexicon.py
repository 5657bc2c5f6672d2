"""Words of the pre-training corpus: plain medical vocabulary and ways to write it down, no hospital's own table."""


def _list(text: str, sign: str = ", ") -> tuple[str, ...]:
    """Split a compact list."""
    return tuple(text.split(sign))


# Speciality -> findings: common knowledge that the base learns by heart.
FINDINGS = {
    speciality: _list(names)
    for speciality, names in {
        "cardiology": "atrial flutter, heart failure, aortic stenosis, unstable angina, pericarditis, atrial "
        "fibrillation, myocarditis, mitral regurgitation, heart block, endocarditis, tachycardia, hypertension",
        "oncology": "ductal carcinoma, lymphoma, myeloma, melanoma, colon cancer, leukaemia, sarcoma, glioma, "
        "thyroid cancer, lobular carcinoma, lung cancer, ovarian cancer",
        "orthopaedics": "hip fracture, rotator cuff tear, meniscus tear, scoliosis, wrist fracture, osteoarthritis, "
        "tendon rupture, ankle sprain, frozen shoulder, femur fracture, disc herniation, bursitis",
        "respiratory": "croup, bronchiolitis, pneumonia, asthma, bronchitis, emphysema, pleural effusion, "
        "pneumothorax, sarcoidosis, tuberculosis, whooping cough, lung abscess",
        "haematology": "anaemia, thrombocytopenia, haemophilia, neutropenia, polycythaemia, sickle cell disease",
        "neurology": "migraine, epilepsy, stroke, multiple sclerosis, neuropathy, meningitis, parkinsonism, dementia",
        "gastroenterology": "gastritis, pancreatitis, hepatitis, cirrhosis, appendicitis, crohn disease, reflux, "
        "peptic ulcer",
        "nephrology": "renal stones, nephritis, cystitis, renal failure, pyelonephritis, proteinuria",
        "endocrinology": "type 2 diabetes, hypothyroidism, thyrotoxicosis, gout, osteoporosis, hyponatraemia",
        "dermatology": "eczema, psoriasis, cellulitis, shingles, urticaria, impetigo",
    }.items()
}

# Drug class -> drugs.
DRUGS = {
    kind: _list(names)
    for kind, names in {
        "beta blocker": "bisoprolol, atenolol, metoprolol, carvedilol",
        "anticoagulant": "apixaban, enoxaparin, warfarin, heparin, rivaroxaban",
        "ace inhibitor": "ramipril, lisinopril, enalapril, perindopril",
        "hormone blocker": "tamoxifen, letrozole, anastrozole, goserelin",
        "cytotoxic": "cisplatin, carboplatin, docetaxel, doxorubicin, methotrexate",
        "painkiller": "naproxen, ibuprofen, paracetamol, tramadol, codeine, morphine",
        "bone drug": "alendronate, denosumab, risedronate",
        "bronchodilator": "salbutamol, ipratropium, salmeterol, theophylline",
        "steroid": "prednisolone, dexamethasone, hydrocortisone, budesonide",
        "antibiotic": "azithromycin, amoxicillin, doxycycline, ceftriaxone, gentamicin, vancomycin",
        "diuretic": "furosemide, bumetanide, spironolactone",
        "antidiabetic": "metformin, gliclazide, sitagliptin, insulin",
        "anticonvulsant": "lamotrigine, valproate, levetiracetam, phenytoin",
        "acid blocker": "omeprazole, lansoprazole, famotidine",
    }.items()
}

PLANS = _list(
    "echo, ablation, stent review, staging scan, radiotherapy, port check, cast check, physiotherapy, nailing, "
    "nebuliser, chest film, discharge, blood cultures, dialysis, biopsy, endoscopy, wound review, diet advice, "
    "home visit, transfusion, spinal tap, hearing test, pacing check, lung function, skin graft, joint wash, "
    "ultrasound, night oxygen, fluid chart, drain removal, eye review, second opinion, fasting bloods, swab, "
    "dose change, observation, transfer, suture removal, speech therapy, allergy test"
)

WARDS = _list("north, south, east, west, upper, lower, day unit, annexe, high care, short stay")
DAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MOODS = _list("calm, anxious, drowsy, alert, tired, cheerful, confused, settled")
ALLERGIES = _list("none, penicillin, latex, nuts, eggs, iodine, aspirin, pollen")
DIETS = _list("normal, soft, fluids only, low salt, diabetic, nil by mouth")

# Field -> short and long labels.
LABELS = {
    "finding": "Finding, dx, Diagnosis, a, main, Problem, impression, Dg, seen, F",
    "drug": "Drug, med, rx, Medicine, takes, Rx, on, m, given",
    "plan": "Plan, next, p, Next step, to do, plan, Then, order",
    "pulse": "Pulse, HR, hr, P, heart rate, bpm, beats",
    "pressure": "BP, bp, pressure, Blood pressure, RR sys",
    "saturation": "SpO2, sat, o2, Saturation, sats, oxygen, O2 sat",
    "temperature": "Temp, t, T, temperature, temp C",
    "resp_rate": "rr, RR, Resp, breaths, resp rate",
    "weight": "Weight, wt, kg, W, body weight",
    "age": "Age, age, years, yrs",
    "sex": "Sex, sex, s, gender",
    "side": "Side, side, limb, which side",
    "bed": "Bed, bed, b, bay, place",
    "cycle": "Cycle, cycle, course, c, round",
    "pain": "Pain, pain, vas, pain score",
    "glucose": "Glucose, glu, sugar, BG",
    "ward": "Ward, ward, unit, where",
    "day": "Day, day, seen on, date",
    "mood": "Mood, mood, state, general",
    "allergy": "Allergy, allergies, alg, reacts to",
    "diet": "Diet, diet, food, eats",
    "clinician": "By, by, seen by, Dr, signed",
    "person": "FA, id, pt, who",
}

# Field -> ways to say it inside a sentence.
PHRASES = {
    "finding": "with {v}; has {v}; presents with {v}; known for {v}; admitted for {v}; seen for {v}; "
    "suffering from {v}",
    "drug": "takes {v}; on {v}; receives {v}; given {v}; started {v}; we continue {v}; treated with {v}",
    "plan": "we agreed on {v}; next step {v}; plan is {v}; we arrange {v}; booked for {v}; to have {v}",
    "pulse": "pulse {v}; heart rate of {v}; pulse at {v} a minute; beating at {v}",
    "pressure": "blood pressure {v}; pressure of {v}; BP {v}",
    "saturation": "saturation {v} percent; saturating at {v}; oxygen {v} percent; oxygen level {v}",
    "temperature": "temperature {v}; {v} degrees; a temperature of {v}",
    "resp_rate": "breathing at {v}; respiratory rate {v}; {v} breaths a minute",
    "weight": "weight {v} kg; weighs {v} kg; {v} kilos",
    "age": "aged {v}; {v} years old; seen at {v} years; at age {v}",
    "sex": "sex {v}; recorded as {v}",
    "side": "on the {v}; {v} side; the {v} limb",
    "bed": "in bed {v}; bed {v}; lies in place {v}",
    "cycle": "cycle {v}; course {v}; now in round {v}",
    "pain": "pain {v} of ten; pain score {v}",
    "glucose": "glucose {v}; a sugar of {v}",
    "ward": "on {v}; ward {v}; in the {v} unit",
    "day": "seen on {v}; on {v}; this {v}",
    "mood": "feels {v}; appears {v}; {v} today",
    "allergy": "allergy {v}; reacts to {v}; allergic to {v}",
    "diet": "diet {v}; eats {v}; food {v}",
    "clinician": "seen by {v}; signed {v}; examined by {v}",
    "person": "patient {v}; this is {v}; case {v}",
}

# Words for invented categories; the hospitals' own words are filtered out of every document.
CATEGORY_WORDS = _list(
    "Falcon, Badger, Otter, Marten, Lynx, Hare, Robin, Wren, Swift, Finch, Raven, Crane, Stork, Egret, Teal, Pipit, "
    "oak, ash, elm, pine, maple, willow, poplar, larch, yew, hazel, coral, pearl, amber, topaz, quartz, silver, "
    "copper, iron, zinc, basalt, granite, marble, slate, flint, red, blue, green, grey, black, white, violet, "
    "orange, north, south, east, west, first, second, third, alpha, beta, gamma, delta, sigma, day, night, inner, "
    "outer, urgent, routine, clinic, theatre, lodge, bridge, harbour, garden, tower, mill, river, lake, hill, field"
)
SYLLABLES = _list(
    "ba be bi bo bu da de di do du fa fe fi fo ga ge gi go ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no ra re "
    "ri ro ru sa se si so ta te ti to va ve vi vo wa we wi zo an en in on ar er or al el il ol am em im et it ot",
    sign=" ",
)

LEVELS = tuple(
    _list(group)
    for group in (
        "low, medium, high",
        "green, amber, red",
        "mild, moderate, severe",
        "routine, soon, urgent",
        "A, B, C",
        "one, two, three",
        "fine, watch, act",
        "minor, major, critical",
        "white, yellow, black",
        "level 1, level 2, level 3",
        "normal, raised",
        "ok, check",
        "yes, no",
        "stay, go",
    )
)

# Parts of local task names.
PLACES = _list(
    "Ward, Theatre, Clinic, Board, Bay, Airway, Tumour board, Desk, Unit, Lab, Regional, District, Night, Day, Chart, "
    "Chemo, Wristband, Form, Box, Door, Register, Round, Handover, Airway clinic, Theatre list, Vitals, Triage, Local, "
    "Stock, Formulary, Team, Bed, Transport, Kitchen, Records, Admission, Discharge, Letter, Booking, Screen"
)
THINGS = _list(
    "code, key, mark, label, box, line, text, numbers, group, level, tag, slot, class, number, entry, sheet line, "
    "colour, list code, sign, row, token, short form, cell, grade"
)
TAILS = ("", "", "", " for the {f}", " of the {f}", ": {f}", " by {f}")
QUESTIONS = _list(
    "Who takes it on?; Send where?; Page whom?; Which team?; Team for the {f}.; Where next?; Who takes the next step?; "
    "Send to which team?; Call whom?; Which list?; Whose {f}?; Which group is this?; How urgent?; What goes here?",
    sign="; ",
)
OPENERS = (
    "The ward round began early.",
    "Handover was short today.",
    "The family was informed.",
    "No new complaints overnight.",
    "Slept well and ate a little.",
    "The wound is dry and clean.",
    "Bloods were taken this morning.",
    "Consent was given and signed.",
    "The letter to the practice is written.",
    "Pain is under control with tablets.",
    "Walks to the window with a stick.",
    "Follow up in two weeks.",
    "The chart was checked by a second nurse.",
    "The chest is clear on both sides.",
    "There is swelling but no redness.",
)
SYSTEMS = (
    "You answer questions about clinical notes.",
    "You are a clerk. Answer with the value only.",
    "Answer briefly.",
    "You fill in forms from notes.",
)
