from lbq.cli import main

main()
