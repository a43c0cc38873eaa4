"""What happens around a decoder layer, one step per file; :mod:`tokenreduce.adapters.language.attach` puts them in
order."""
