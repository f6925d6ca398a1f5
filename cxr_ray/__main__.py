"""`python -m cxr_ray` is `cxr-ray`."""

from cxr_ray.console import main

main()
