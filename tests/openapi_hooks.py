"""What schemathesis cannot know by itself: how STOW-RS writes its bodies."""

import schemathesis


@schemathesis.serializer('multipart/related; type="application/dicom"')
def related(ctx, value):
    return b"--b\r\nContent-Type: application/dicom\r\n\r\n" + str(value).encode() + b"\r\n--b--\r\n"
