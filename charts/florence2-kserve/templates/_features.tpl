{{/* Keys of Knative's config-features that these values need, one a line. Takes the root. */}}
{{- define "florence2.knativeFeatures" -}}
{{- $root := . -}}
{{- $needed := dict -}}
{{- range $part := list "transformer" "predictor" -}}
{{- $values := index $root.Values $part -}}
{{- if include "florence2.podSecurity" (dict "root" $root "part" $part) -}}
{{- $_ := set $needed "kubernetes.podspec-securitycontext" true -}}
{{- end -}}
{{- range $field := include "florence2.scheduling" (dict "root" $root "part" $part) | fromYaml | keys -}}
{{- $_ := set $needed (printf "kubernetes.podspec-%s" (lower $field)) true -}}
{{- end -}}
{{- if $values.cache.existingClaim -}}
{{- $_ := set $needed "kubernetes.podspec-persistent-volume-claim" true -}}
{{- $_ := set $needed "kubernetes.podspec-persistent-volume-write" true -}}
{{- end -}}
{{- range $volume := $values.extraVolumes -}}
{{- if $volume.persistentVolumeClaim -}}
{{- $_ := set $needed "kubernetes.podspec-persistent-volume-claim" true -}}
{{- if not $volume.persistentVolumeClaim.readOnly -}}
{{- $_ := set $needed "kubernetes.podspec-persistent-volume-write" true -}}
{{- end -}}
{{- end -}}
{{- range $kind := list "hostPath" "csi" "image" -}}
{{- if hasKey $volume $kind -}}
{{- $_ := set $needed (printf "kubernetes.podspec-volumes-%s" (lower $kind)) true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $variable := $values.extraEnv -}}
{{- if or (dig "valueFrom" "fieldRef" nil $variable) (dig "valueFrom" "resourceFieldRef" nil $variable) -}}
{{- $_ := set $needed "kubernetes.podspec-fieldref" true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- keys $needed | sortAlpha | join "\n" -}}
{{- end -}}
