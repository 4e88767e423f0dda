"""What Lightning starts as further processes of a run: ``torchmd-train`` with the arguments of the first."""

from torchmdnet.scripts.train import main

if __name__ == "__main__":
    main()
