"""PEFT adapters: as finetunes, and as what a merge becomes. Needs the extra `adapters`."""
