"""The command line `star-export`: the parser, one function per verb, and progress on stderr."""
