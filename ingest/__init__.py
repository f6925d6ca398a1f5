"""Sources of radiographs (the NIH release, DICOM archives, phantoms) turned into shards on Ray Data."""
