"""A folder → an artifact that was checked, file by file, before anything of it is used."""
