"""placeholder until the commands are written"""
