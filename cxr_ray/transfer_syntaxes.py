"""The transfer syntaxes that are decoded, most wanted first, each with what decodes it.

One list for all: the node offers exactly these to its peers, and `cxr_ray.dicom_codecs` decodes exactly these. Where a
peer proposes several, the first of this order that it proposes is taken: what costs no decoding first, then what is
lossless. Nothing is imported here, so that a process which only receives need not load a codec.

References: PS3.5 section 10 and annex A.
"""

from enum import Enum


class Decoder(Enum):
    """What turns the pixels of a transfer syntax into stored values."""

    NATIVE = "a view of the file's bytes"
    RLE = "PackBits of Pillow"
    ISOLATED = "GDCM, in a process of its own"
    PILLOW = "pillow"
    CHARLS = "pyjpegls"
    OPENJPEG = "pylibjpeg"


EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
IMPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"

DECODERS = {
    EXPLICIT_LITTLE_ENDIAN: Decoder.NATIVE,
    IMPLICIT_LITTLE_ENDIAN: Decoder.NATIVE,
    EXPLICIT_BIG_ENDIAN: Decoder.NATIVE,
    DEFLATED: Decoder.NATIVE,
    "1.2.840.10008.1.2.5": Decoder.RLE,
    "1.2.840.10008.1.2.4.70": Decoder.ISOLATED,  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.57": Decoder.ISOLATED,  # JPEG lossless, process 14
    "1.2.840.10008.1.2.4.80": Decoder.CHARLS,  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90": Decoder.OPENJPEG,  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.201": Decoder.OPENJPEG,  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": Decoder.OPENJPEG,  # HTJ2K lossless RPCL
    "1.2.840.10008.1.2.4.81": Decoder.CHARLS,  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.91": Decoder.OPENJPEG,  # JPEG 2000
    "1.2.840.10008.1.2.4.203": Decoder.OPENJPEG,  # HTJ2K
    "1.2.840.10008.1.2.4.50": Decoder.PILLOW,  # JPEG baseline, 8 bits
    "1.2.840.10008.1.2.4.51": Decoder.ISOLATED,  # JPEG extended, 12 bits
}
TRANSFER_SYNTAXES = tuple(DECODERS)
