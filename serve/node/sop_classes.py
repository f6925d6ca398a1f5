"""The SOP classes that the node speaks, as the receiving side needs them."""

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
STORAGE_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
STORAGE_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1",  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1",  # Digital X-Ray, for processing
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture: real chest files arrive as it
)

_STANDARD = "1.2.840.10008."
_STANDARD_STORAGE = "1.2.840.10008.5.1.4.1.1."


def is_storage(abstract_syntax: str) -> bool:
    """Whether an abstract syntax may be a storage SOP class: a standard one (PS3.4 section B.5), or anybody's private one."""
    return abstract_syntax.startswith(_STANDARD_STORAGE) or not abstract_syntax.startswith(_STANDARD)
