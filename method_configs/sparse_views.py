"""Registration of the dataparser `sparse-views` with nerfstudio."""

from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from nerfstudio_enhancer.scene.sparse_views import SparseViewsDataParserConfig

sparse_views_dataparser = DataParserSpecification(
    config=SparseViewsDataParserConfig(),
    description="A few reference photographs of a nerfstudio-data or COLMAP folder; test views never reach training.",
)
