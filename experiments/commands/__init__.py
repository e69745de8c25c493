"""The commands of the command line, one file each. Imports all other rooms of experiments but the api."""
