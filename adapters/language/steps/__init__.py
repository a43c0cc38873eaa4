"""What happens around a decoder layer, one step per file; :mod:`tokenreduce.adapters.language.order` puts them in
order."""
