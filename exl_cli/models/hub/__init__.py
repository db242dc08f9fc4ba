"""Models from the Hub: what a repository holds, bringing it here whole, and knowing later that it is whole.

| module | holds |
|---|---|
| `names` | which repository and revision a text means; which file names are safe to write |
| `store` | a model's folder on disk: the marker of a complete download, what is still on its way |
| `locking` | one download of a model at a time |
| `environment` | the user's settings that huggingface_hub reads, checked |
| `client` | every request to the Hub, with retries |
| `failures` | which failures pass by themselves, and what a person should read about the others |
| `listing` | the files of a revision, and which of them inference needs |
| `transfer` | one file, from wherever it stopped to its verified end |
| `plan` | what is wanted, what the Hub has, what of it is here |
| `xet` | bytes from xet storage |
| `download` | a whole model: free disk, fetch in parallel, put in place |
| `branches` | the quantizations that a repository offers in its branches |

huggingface_hub does the talking (session, login, metadata, errors), but not the writing of files: since its 1.18 it
downloads to a temporary file of a random name that it deletes on failure, so that nothing is left to resume from
(huggingface_hub pull request 4228, and still so in 2.4). 40 GB over a shaky line need better than that, so the bytes
are ours: plain HTTP with a Range, or hf-xet's stream from an offset, appended to a part file that stays.
"""
