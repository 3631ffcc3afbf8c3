"""The entries of packages.yaml for named packages, from the package lists that apt has.

python recipes/data/list_packages.py NAME … >> recipes/data/packages.yaml
"""

from __future__ import annotations

import re
import subprocess
import sys


def entry(record: str) -> str:
    """One entry in YAML from a record of `apt-cache show`."""
    fields = dict(re.findall(r"^([\w-]+): (.*)$", record, re.MULTILINE))
    return (
        f"{fields['Package']}:\n  version: '{fields['Version']}'\n  file: {fields['Filename']}\n"
        f"  size: {fields['Size']}\n  sha256: {fields['SHA256']}\n"
    )


def main() -> None:
    """Print the entries, in the order of their names."""
    command = ["apt-cache", "show", "--no-all-versions", *sorted(set(sys.argv[1:]))]
    records = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n\n")
    print("".join(entry(record) for record in records if record.strip()), end="")


if __name__ == "__main__":
    main()
