"""Answers: the Ray Serve application, the results store, the DICOM node and the demo that uses everything."""
