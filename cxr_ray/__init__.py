"""What the model is, how it learns and how it is judged.

Knows nothing of where images come from, of DICOM networking or of HTTP.
"""

__version__ = "0.1.0"
