"""python -m mtp_ext demo | train | bench | env"""

import importlib
import sys

COMMANDS = {
    "demo": ("mtp_ext.decode.demo", "decode a real model with multi-token prediction"),
    "train": ("mtp_ext.train.cli", "train an MTP head"),
    "bench": ("mtp_ext.bench", "time the operators against their floor and their peers"),
    "env": ("mtp_ext.env", "print what a bug report needs"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m mtp_ext COMMAND [options]\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:6} {purpose}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
