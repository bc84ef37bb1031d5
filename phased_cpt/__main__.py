"""`python -m phased_cpt`, and what `deepspeed --module phased_cpt` starts on every rank."""

from phased_cpt.cli import main

if __name__ == "__main__":
    main()
