"""`python -m agentmem`."""

from .cli.main import main

main()
