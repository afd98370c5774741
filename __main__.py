from rprune.cli.app import main

main()
