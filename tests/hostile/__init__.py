"""Inputs that somebody made to do harm, or that are damaged: small makers, and the line that each ends in."""
