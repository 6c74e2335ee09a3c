"""MuDSC (arXiv 2403.01753): units of models that share no initialisation, put in one order before merging."""
