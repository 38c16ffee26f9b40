"""Models of scvi-tools as sources: counts of genes, proteins and open regions in single cells.

References:
    | Deep generative modeling for single-cell transcriptomics (Lopez et al., Nature Methods 2018)
    | Interpretable factor models of single-cell RNA-seq (Svensson et al., Bioinformatics 2020)
    | Probabilistic harmonization and annotation (Xu et al., Molecular Systems Biology 2021)
    | Joint probabilistic modeling of single-cell multi-omic data (Gayoso et al., Nature Methods 2021)
    | PeakVI: a deep generative model of single-cell accessibility (Ashuach et al., 2022)
    | https://github.com/scverse/scvi-tools
"""

from ncprior.adapters.scvi.source import SCVISource

__all__ = ["SCVISource"]
