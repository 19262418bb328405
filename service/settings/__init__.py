"""The configuration: one frozen, validated `Settings` from YAML files, `MODALKIT_…` variables and arguments."""

from modalkit.service.settings.deployment import BuildConfig, CloudBucketMount, DeploymentConfig
from modalkit.service.settings.effective import effective_settings, effective_yaml
from modalkit.service.settings.layers import deep_merge
from modalkit.service.settings.models import (
    ADAPTERS,
    Adapter,
    AppSettings,
    AsyncConfig,
    AuthConfig,
    BatchConfig,
    KeyConfig,
    KeyScope,
    QueueConfig,
    RequestConfig,
)
from modalkit.service.settings.problems import SettingsError
from modalkit.service.settings.server import ServerConfig
from modalkit.service.settings.settings import ModelEntry, ModelSettings, Settings

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AppSettings",
    "AsyncConfig",
    "AuthConfig",
    "BatchConfig",
    "BuildConfig",
    "CloudBucketMount",
    "DeploymentConfig",
    "KeyConfig",
    "KeyScope",
    "ModelEntry",
    "ModelSettings",
    "QueueConfig",
    "RequestConfig",
    "ServerConfig",
    "Settings",
    "SettingsError",
    "deep_merge",
    "effective_settings",
    "effective_yaml",
]
