"""The command line: parse, call, show. What the commands do lives in the layers below."""
