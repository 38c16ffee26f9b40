"""Texts of the command line's help."""

DESCRIPTION = """\
Better priors for pretrained VAEs by noise contrastive estimation.

Examples:
  ncprior demo                            train and improve a small VAE of digits, a minute or two
  ncprior demo --data mnist               the same on MNIST, some minutes
  ncprior improve my_vae.py:source --data my_vae.py:x_train
                                          find a better prior for your VAE
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:x_test
                                          measure the quality of the heads of a saved prior
  ncprior sample my-prior --source my_vae.py:source -n 1000 --out samples
                                          draw samples into files; run it again to go on
  ncprior report my-prior --source my_vae.py:source --data my_vae.py:x_test
                                          write a page with pictures and measurements
  ncprior inspect user/my-prior           show the configuration of a saved prior

`ncprior COMMAND --help` explains the options of a command.
"""

DEMO = """\
Examples:
  ncprior demo
  ncprior demo --data mnist --seed 1 --out mnist-demo
"""

IMPROVE = """\
The VAE and the data are your Python objects, given as FILE.py:NAME or MODULE:NAME. The VAE is a
LatentSource. The data are a tensor, an array or table of numbers, a dataset or a DataLoader. Both
can also be functions without arguments that return the object.

Example my_vae.py, with vae, base and posterior as in the README:

    source = SingleGroup(base, posterior, vae.decode, module=vae)
    x_train = torch.load("train.pt", weights_only=True)

The folder gets the heads with their base and sampler, a model card, and report.html. If the command
was interrupted, run it again: it goes on.

Examples:
  ncprior improve my_vae.py:source --data my_vae.py:x_train
  ncprior improve my_vae.py:source --data my_vae.py:x_train --budget 500 --max-seconds 600 --out best
  ncprior sample my-prior --source my_vae.py:source -n 1000
"""

REPORT = """\
The VAE and the data are your Python objects, as for `ncprior diagnose`.

Examples:
  ncprior report my-prior --source my_vae.py:source --data my_vae.py:x_test
  ncprior report my-prior --source my_vae.py:source --data my_vae.py:x_test --train my_vae.py:x_train
  ncprior report user/my-prior --source my_vae.py:source --data my_vae.py:x_test --out page.html
"""

DIAGNOSE = """\
The VAE and the data are your Python objects, given as FILE.py:NAME or MODULE:NAME. For --source,
NAME is a LatentSource. For --data and --train, NAME is a tensor, an array or table of numbers, a
dataset or a DataLoader. NAME can also be a function without arguments that returns the object. The
file is imported, so its code runs as with `python FILE.py`; a module is also looked for in the
working folder. No code from PATH_OR_REPO is run.

Example my_vae.py, with vae, base and posterior as in the README:

    source = SingleGroup(base, posterior, vae.decode, module=vae)
    x_test = torch.load("test.pt", weights_only=True)

Examples:
  ncprior diagnose my-prior --source my_vae.py:source --data my_vae.py:x_test
  ncprior diagnose user/my-prior --source my_vae.py:source --data my_vae.py:x_test \\
      --plot report.png
"""

SAMPLE = """\
The VAE is your Python object, given as FILE.py:NAME or MODULE:NAME: a LatentSource, or a function
without arguments that returns one. The file is imported, so its code runs as with `python FILE.py`.
No code from PATH_OR_REPO is run.

Samples are drawn by the sampler that was saved with the prior:

    prior.sampler = recommend_sampler(diagnose(prior, x_test), budget=50).sampler
    prior.save_pretrained("my-prior")

The folder has one safetensors file per part, with the samples x and their latents z_0, z_1, …
If the command was interrupted, run it again: it draws the missing parts only. Read the samples by

    from ncprior.jobs import read_parts
    x = torch.cat([part["x"] for part in read_parts("samples")])

Examples:
  ncprior sample my-prior --source my_vae.py:source
  ncprior sample user/my-prior --source my_vae.py:source -n 50000 --out fid-samples --seed 1
  ncprior sample my-prior --source my_vae.py:source --proposals 500 --batch-size 100
  ncprior sample my-prior --source my_vae.py:source -n 64 --condition my_vae.py:labels
  ncprior sample my-prior --source my_vae.py:source --out s3://bucket/samples
  ncprior sample my-prior --source my_vae.py:source -n 100000 --parts $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
"""

INSPECT = """\
Examples:
  ncprior inspect my-prior
  ncprior inspect user/my-prior --revision v1
"""
