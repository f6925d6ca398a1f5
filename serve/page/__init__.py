"""The page: a worklist and a view of a study, for people in a reading room.

Rendered here, with a little script and no build step. `rendering` makes HTML of templates and turns errors into pages, `assets`
serves what browsers keep, `sessions` lets people in by their token, `worklist` and `study` say what is shown.
"""
