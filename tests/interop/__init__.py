"""Our folders in the hands of SAELens and dictionary_learning, theirs in ours, in an environment of their own."""
