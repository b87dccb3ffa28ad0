"""``python -m lbq``"""

from lbq.cli import main

main()
