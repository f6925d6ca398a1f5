"""The words by which radiographers say what an image shows, in the languages that archives write.

Descriptions are free text, in which a name may stand: they are searched for whole words of these lists, and a message
repeats the word of the list and never the text. Words are in capitals and without accents.
"""

import re
import unicodedata

VIEWS = ("PA", "AP")
_SPELLINGS = (
    (re.compile(r"\bPOSTER(?:O|IOR)[\W_]*ANTERIOR"), "PA"),
    (re.compile(r"\bANTER(?:O|IOR)[\W_]*POSTERIOR"), "AP"),
    (re.compile(r"\bP[./-]A\b"), "PA"),
    (re.compile(r"\bA[./-]P\b"), "AP"),
)


def words(description: str) -> frozenset[str]:
    """The words of a text in capitals and without accents; p.a. and postero-anterior become PA, and so for AP."""
    plain = unicodedata.normalize("NFKD", description.upper())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    for spelling, view in _SPELLINGS:
        plain = spelling.sub(view, plain)
    return frozenset(re.findall(r"[A-Z0-9]+", plain))


# What part of a body part's value is enough; PORTCHEST and CHEST_2V are written too.
CHEST_STEMS = ("CHEST", "THORAX", "TORAX", "TORACE", "LUNG", "PULMO", "POLMON", "POUMON", "BRUSTKORB", "CXR")
CHEST = words("CHEST CXR THORAX TORAX TORACE LUNG LUNGS LUNGE LUNGEN POUMON POUMONS PULMON PULMONES POLMONE POLMONI BRUSTKORB")
NO_BODY_PART = words("UNKNOWN UNDEFINED UNSPECIFIED OTHER NONE ANY DEFAULT")

# Left out are words that are common names or mean something else in another language: MAIN, PIE, COLON, CRANE.
OTHER_REGIONS = words(
    """
    ABDOMEN ABDOMINAL KUB STOMACH BLADDER PELVIS PELVIC HIP HIPS SACRUM COCCYX SACROILIAC
    SPINE CSPINE TSPINE LSPINE CERVICAL LUMBAR LUMBOSACRAL SCOLIOSIS NECK
    HAND HANDS WRIST FINGER FINGERS THUMB FOREARM ELBOW HUMERUS SHOULDER SHOULDERS CLAVICLE SCAPULA
    RIB RIBS STERNUM FEMUR THIGH KNEE KNEES PATELLA TIBIA FIBULA LEG LEGS ANKLE FOOT FEET TOE TOES HEEL CALCANEUS
    EXTREMITY EXTREMITIES LIMB SKULL HEAD FACIAL SINUS SINUSES ORBIT ORBITS MANDIBLE MAXILLA TEETH DENTAL BREAST
    BECKEN HUFTE HUEFTE SCHULTER WIRBELSAULE WIRBELSAEULE HWS BWS LWS SCHADEL SCHAEDEL KNIE FUSS HANDGELENK
    ELLENBOGEN RIPPEN ABDOMENUBERSICHT
    BASSIN HANCHE EPAULE RACHIS GENOU CHEVILLE COUDE POIGNET COTES ABDOMINALE
    CADERA HOMBRO COLUMNA CRANEO RODILLA TOBILLO CODO MUNECA MANO COSTILLAS PELVE QUADRIL JOELHO OMBRO COLUNA
    BACINO SPALLA COLONNA CRANIO GINOCCHIO CAVIGLIA GOMITO POLSO PIEDE ADDOME
    """
)

FRONTAL = words("PA AP FRONTAL FRONTALE FACE FRENTE")
# FRONTAL is no view of its own: the model was taught PA and AP.
NOT_FRONTAL = words(
    """
    LATERAL LATERALE LAT LATERALS PROFIL PERFIL SEITLICH SEITL DWARS BOCZNE
    OBLIQUE OBL OBLIQUES OBLICUA OBLIQUA SCHRAG SCHRAEG SAGITTAL TANGENTIAL SWIMMERS
    """
)
# Abbreviations that are plain in a ViewPosition (PS3.3 C.8.7.1.1.1, C.8.11.5.1.1) and could be anything in a free text.
NOT_FRONTAL_VIEW_POSITIONS = NOT_FRONTAL | words("LL RL LLD RLD LLO RLO LPO RPO LAO RAO XTABLE CC MLO ML LM")
