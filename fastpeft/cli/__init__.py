"""The command line: `fastpeft finetune`, `merge`, `bench` and `doctor`.

`app` declares the options and imports nothing heavy; each command's work is in the module of its name.
"""
