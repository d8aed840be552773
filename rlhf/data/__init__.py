"""From files to records, from records to token ids."""
