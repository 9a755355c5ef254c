"""Perceptual compression, LDM Sec. 3.1: the autoencoders of stage 1 and their losses."""
