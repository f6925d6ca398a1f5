"""Results of a study as objects: structured report, Secondary Capture, JSON.

`study_answer` says what they are made from, `from_service` how that comes from the service's answers. What makes DICOM
objects is imported by who needs it: highdicom and Pillow take a second or two.
"""
