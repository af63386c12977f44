"""The first step of a job: does every node do what training will ask of it?"""
