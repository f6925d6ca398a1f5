"""What a storage status means for delivery (PS3.4 section B.2.3, PS3.7 Annex C).

Warnings are deliveries: the receiver has the instance. Lack of resources and failures while processing pass. What says that
this instance, its class or we ourselves are not taken stays as it is until somebody changes something.
"""

from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient

_DELIVERED = {
    0x0000: "success",
    0x0001: "warning: requested optional attributes are not supported",
    0x0107: "warning: attribute list error",
    0x0111: "the receiver has this instance already",
    0x0116: "warning: attribute value out of range",
}
_PERMANENT = {
    0x0105: "no such attribute",
    0x0106: "invalid attribute value",
    0x0112: "no such instance",
    0x0115: "invalid argument value",
    0x0117: "invalid SOP instance",
    0x0118: "no such SOP class",
    0x0119: "class and instance conflict",
    0x0120: "missing attribute",
    0x0121: "missing attribute value",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0x0211: "unrecognised operation",
    0x0212: "mistyped argument",
}
_PERMANENT_RANGES = (
    (0xA800, 0xA8FF, "SOP class not supported"),
    (0xA900, 0xA9FF, "data set does not match SOP class"),
    (0xC000, 0xCFFF, "cannot be understood"),
)
_TRANSIENT = {0x0110: "processing failure", 0x0210: "duplicate invocation", 0x0213: "resource limitation"}


def storage_outcome(status: int, comment: str = "") -> Outcome:
    """What a C-STORE status, or a failure reason of STOW-RS or storage commitment, means.

    Parameters
    ----------
    comment
        The receiver's words.
    """
    code = f"0x{status:04X}"
    if status in _DELIVERED or 0xB000 <= status <= 0xBFFF:
        return Delivered(code)
    if status in _PERMANENT:
        return Permanent(f"refused with {code}, {_PERMANENT[status]}", comment)
    for first, last, words in _PERMANENT_RANGES:
        if first <= status <= last:
            return Permanent(f"refused with {code}, {words}", comment)
    if 0xA700 <= status <= 0xA7FF:
        return Transient(f"refused with {code}, out of resources", comment)
    return Transient(f"refused with {code}, {_TRANSIENT.get(status, 'which no standard names')}", comment)
