"""`python -m distilpeft`, for `torchrun -m distilpeft run RECIPE` and `accelerate launch -m distilpeft ...`."""

from distilpeft.cli import main

if __name__ == "__main__":
    main()
