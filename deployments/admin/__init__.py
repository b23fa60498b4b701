"""Tenants and keys from the command line, straight in the platform's database."""
